"""What the commands share: the terminal, its progress bars, arguments that several have."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from .progress import Advance

# Paths, patterns and texts are shown as they are: no [markup], no :emoji:. Lines are written by `out`, which doesn't fold them at the terminal's width.
console = Console(markup=False, emoji=False, highlight=False)
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, FOLDER:FILE.gguf, or smollm2-135m.", show_default=False)]
Activations = Annotated[
    str | None,
    typer.Option(
        help="In packed products: auto, as exact as their dtype; int16 or int8, faster and rounded for every 64 values; int8_token, for every token.",
        show_default="as the checkpoint says",
    ),
]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.")]


class TerminalProgress:
    """Bars with the time left on a terminal; elsewhere one line a block, and a line when a task begins and ends."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """See normtweak.progress.Progress."""
        began = time.perf_counter()
        if not console.is_terminal:
            console.out(f"{description} ({total} steps)")
            yield lambda note="": console.out(f"  {note}") if note else None
            console.out(f"{description}: {time.perf_counter() - began:.1f} s")
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Bars(*columns, console=console, transient=True) as bars:
            task = bars.add_task(description, total=total)

            def advance(note: str = "") -> None:
                bars.advance(task)
                if note:
                    bars.update(task, description=f"{description} · {note}")

            yield advance
        console.out(f"{description}: {time.perf_counter() - began:.1f} s")
