"""`normtweak paper`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import Device, TerminalProgress, console


def paper(
    model: Annotated[str, typer.Option(metavar="MODEL", help="Float model: hub id, folder, FOLDER:FILE.gguf, or smollm2-135m.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the results; an earlier run's is gone on with.", show_default=False)],
    table: Annotated[list[int] | None, typer.Option(help="2, 3, 4, 6, 7, 8 or 9; repeatable.", show_default=False)] = None,
    figure: Annotated[list[int] | None, typer.Option(help="1.", show_default=False)] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each quantization.")] = 3,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 256,
    text: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="UTF-8 text for perplexity; repeatable. Default: the Python language reference.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows taken from each text, evenly spaced.")] = 40,
    window_length: Annotated[int, typer.Option(help="Tokens in each window.")] = 512,
    lambada: Annotated[list[Path] | None, typer.Option(metavar="FILE.jsonl", help="Last words of passages; repeatable.", show_default=False)] = None,
    choice: Annotated[
        list[Path] | None, typer.Option(metavar="FILE.jsonl", help="Multiple choice, for table 7; repeatable.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="So many items of each task at most.", min=1, show_default=False)] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Calibration text for table 8 beside generated and random; repeatable.", show_default=False),
    ] = None,
    languages: Annotated[str | None, typer.Option(help="Of table 8's V2 text.", show_default="the family's own")] = None,
    rows: Annotated[str, typer.Option(metavar="REGEX", help="Only rows with this in their labels.", show_default=False)] = "",
    device: Device = "auto",
) -> None:
    """Rerun experiments of the paper (arXiv 2309.02784) on MODEL: tables with standard errors over seeds, CSV, and figure 1. See docs/paper.md."""
    from ..evaluate import PYTHON_DOCS
    from ..paper.lab import Evaluation
    from ..paper.run import Request, run

    request = Request(tuple(table or ()), tuple(figure or ()), seeds, samples, length, rows, tuple(calibration or ()), languages)
    evaluation = Evaluation(tuple(text or [PYTHON_DOCS]), windows, window_length, tuple(lambada or ()), tuple(choice or ()), limit)
    for line in run(model, request, evaluation, out, TerminalProgress(), device):
        (console.out if isinstance(line, str) else console.print)(line)
