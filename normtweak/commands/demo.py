"""`normtweak demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import TerminalProgress, console


def demo(
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 28,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 256,
    out: Annotated[Path | None, typer.Option(help="Keep the checkpoints in this new folder.", show_default=False)] = None,
) -> None:
    """Quantize the embedded SmolLM2-135M at W4 and W2, with and without tweak and polish; a table says what each lost."""
    from ..demo import run

    for line in run(samples, length, out, TerminalProgress()):
        (console.out if isinstance(line, str) else console.print)(line)
