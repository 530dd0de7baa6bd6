"""`normtweak eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..terminal import Activations, Device, Model, TerminalProgress, console

if TYPE_CHECKING:
    from ..evaluate import Comparison


def evaluate(
    model: Model,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A second model, the float one say, that all figures are compared with.", show_default=False)
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="UTF-8 text; repeatable. Default, when no task is given: the Python language reference.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows taken from each text, evenly spaced.")] = 40,
    length: Annotated[int, typer.Option(help="Tokens in each window.")] = 512,
    lambada: Annotated[
        list[Path] | None, typer.Option(metavar="FILE.jsonl", help="Last words of passages (context, continuation); repeatable.", show_default=False)
    ] = None,
    choice: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.jsonl", help="Multiple choice: HellaSwag, PIQA, WinoGrande, OpenBookQA, COPA; repeatable.", show_default=False),
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="LIST", help="Any of lm-eval's tasks, by commas (extra: eval).", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="So many items of each task at most.", min=1, show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="Of matrix products: auto, float32 or bfloat16.")] = "auto",
    activations: Activations = None,
    device: Device = "auto",
    card: Annotated[bool, typer.Option("--card", help="Also note the texts' scores in MODEL's model card, a folder that normtweak wrote.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the scores here.", show_default=False)] = None,
) -> None:
    """Perplexity of MODEL and how far it is from a second one; tasks with standard errors, and paired differences with 95 % intervals."""
    from .. import models
    from ..activations import compute_dtype, device_of
    from ..calibration import leading_bos
    from ..card import add_scores, check_has_card
    from ..checkpoint import check_parent, write_json
    from ..evaluate import PYTHON_DOCS, Suite, check_names, read_text, score, text_windows

    place = device_of(device)
    precision = compute_dtype(dtype, place)
    if json_file is not None:
        check_parent(json_file)
    if card:
        check_has_card(Path(model))
        check_names("eval", "text", text or [])
    suite = Suite.read(lambada or [], choice or [], tasks.split(",") if tasks else [], limit)
    texts = {name: read_text(name) for name in text or ([] if suite else [PYTHON_DOCS])}
    folder = models.ModelFolder(models.resolve(model))
    tokenizer = folder.tokenizer
    compared = [] if against is None else [models.ModelFolder(models.resolve(against))]
    for other in compared:
        folder.check_same_vocabulary("eval", other)
    for each in [folder, *compared] if texts else []:
        each.check_length("eval", length, bos=leading_bos(tokenizer) is not None)
    chosen = {name: text_windows(tokenizer, content, windows, length) for name, content in texts.items()}
    loaded = models.load(model, device=place, activations=activations)
    reference = None if against is None else models.load(against, device=place)
    scores = {name: score(loaded, tokenizer, ids, against=reference, dtype=precision, progress=TerminalProgress()) for name, ids in chosen.items()}
    rows = suite.run(loaded, tokenizer, against=reference, dtype=precision, progress=TerminalProgress())
    if scores:
        table = Table("text", "perplexity", "over the other's [95 %]", "KL to it", "top-1 agreement")
        for name, s in scores.items():
            table.add_row(
                name, _with_error(s.perplexity, s.standard_error, ".3f"), _or_dash(s.ratio),
                _with_error(s.kl, s.kl_error, ".4f"), _with_error(s.top1_agreement, s.top1_error, ".1%"),
            )  # fmt: skip
        console.print(table)
    if rows:
        console.print(_task_table(rows, against is not None))
    if card:
        add_scores(Path(model), {name: asdict(s) for name, s in scores.items()}, against)
    if json_file is not None:
        settings = {"model": model, "against": against, "windows": windows, "length": length, "dtype": str(precision).removeprefix("torch.")}
        settings |= {"activations": activations, "limit": limit}
        write_json(json_file, settings | {"scores": {name: asdict(s) for name, s in scores.items()}, "tasks": [asdict(row) for row in rows]})


def _task_table(rows: list[Comparison], compared: bool) -> Table:
    table = Table("task", "metric", "value", *(("the other's", "difference (of perplexities: ratio) [95 %]") if compared else ()))
    for row in rows:
        table.add_row(row.task, row.metric, str(row.value), *((_or_dash(row.other), _or_dash(row.difference)) if compared else ()))
    return table


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _with_error(value: float | None, error: float | None, form: str) -> str:
    return "-" if value is None else format(value, form) + ("" if error is None else f" ± {format(error, form)}")
