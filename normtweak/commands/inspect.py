"""`normtweak inspect`."""

from __future__ import annotations

from rich.table import Table

from ..terminal import Model, console


def inspect(model: Model) -> None:
    """What MODEL is made of: family, blocks, sizes, bits, the recipe it was made by, and the kernels that would run it."""
    from ..describe import describe

    for section in describe(model):
        table = Table(title=section.title, show_header=False, title_justify="left")
        for key, value in section.rows:
            table.add_row(key, value)
        console.print(table)
