"""`transformers serve` with packed linears: its command line is run in this process, where normtweak's quantizer is registered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import transformers as _register  # noqa: F401


def run(folder: Path, host: str, port: int, options: Sequence[str]) -> None:
    """Serve a folder until interrupted. Raises ValueError for a path that transformers' server takes for something else."""
    name = str(folder)
    if "@" in name:
        raise ValueError(f"serve: folder must be a path without @, which transformers takes for a revision, got {name}")
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.transformers import app

    def served(cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [{"id": name, "object": "model", "created": int(folder.stat().st_mtime), "owned_by": "normtweak"}]

    # /v1/models would list the hub's cache, in which no folder is, and fail where there is no cache.
    ModelManager.get_gen_models = staticmethod(served)  # type: ignore[assignment, method-assign]
    app(["serve", name, "--host", host, "--port", str(port), *options], prog_name="transformers")
