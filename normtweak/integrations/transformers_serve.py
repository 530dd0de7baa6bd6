"""`transformers serve` with packed linears: its command line is run in this process, where normtweak's quantizer is registered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import transformers as _register  # noqa: F401


def run(folder: Path, host: str, port: int, options: Sequence[str]) -> None:
    """Serve a folder until interrupted. Raises ValueError for a path that transformers' server takes for something else."""
    from transformers.cli.transformers import app

    name = str(folder)
    if "@" in name:
        raise ValueError(f"serve: folder must be a path without @, which transformers takes for a revision, got {name}")
    app(["serve", name, "--host", host, "--port", str(port), *options], prog_name="transformers")
