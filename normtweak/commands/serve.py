"""`normtweak serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `normtweak quantize` wrote, or another model folder.", show_default=False)],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTION ...]", help="Options of the engine's own command line, after --.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    engine: Annotated[str, typer.Option(help="vllm, transformers, or auto: vLLM where it is installed.")] = "auto",
) -> None:
    """An OpenAI-compatible endpoint for FOLDER: chat, completions, streaming, /health. Requests call the model by FOLDER as it is given."""
    from .. import serving

    serving.serve(folder, host=host, port=port, engine=engine, options=options or [])
