"""`normtweak convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import Model, TerminalProgress, console


def convert(
    model: Model,
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.", show_default=False)],
    form: Annotated[str, typer.Option("--format", help="gptq, gptq_v2 or compressed-tensors.", show_default=False)],
) -> None:
    """Write the packed checkpoint MODEL in another format, bit for bit the same numbers."""
    from ..convert import convert as run

    size = run(model, out=out, format=form, progress=TerminalProgress())
    console.out(f"{out}: {size / 1e6:.1f} MB, {form}")
