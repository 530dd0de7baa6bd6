"""`normtweak bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..terminal import console


def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Packed model; default: linears of 7B and 8B models at 4 bits.", show_default=False)
    ] = None,
    warm: Annotated[bool, typer.Option("--warm", help="Time how the GPU's kernels may be launched and keep the fastest for later runs.")] = False,
) -> None:
    """Choose how kernels are launched on this machine's GPU, for MODEL's linears. (make bench and make gpu run the benchmarks.)"""
    from ..warm import warm as choose

    if not warm:
        raise ValueError("bench: warm must be asked for with --warm, got nothing to do")
    for line in choose(model):
        console.out(line)
