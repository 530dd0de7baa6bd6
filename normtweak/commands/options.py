"""Options that `quantize` and `tweak` share: the calibration text and the configuration file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Source = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="generated (by the float model itself), random, a UTF-8 text FILE.txt, FILE.jsonl, or hf:DATASET (hub or folder).",
        show_default="generated",
    ),
]
Languages = Annotated[
    str | None,
    typer.Option(
        metavar="en:0.49,zh:0.26",
        help="What generated text begins with: words of these languages; family: those of the model's own corpus; any: any token.",
        show_default="a capitalised word",
    ),
]
Words = Annotated[
    list[str] | None,
    typer.Option(metavar="LANGUAGE=FILE", help="A language's words, one a line, where its script doesn't tell them; repeatable.", show_default=False),
]
Field = Annotated[str | None, typer.Option(help="Of a line of FILE.jsonl or a row of hf:DATASET.", show_default="text; with --chat messages")]
Subset = Annotated[str | None, typer.Option(help="Of hf:DATASET.", show_default=False)]
Split = Annotated[str | None, typer.Option(help="Of hf:DATASET.", show_default="train")]
Chat = Annotated[bool, typer.Option("--chat", help="The field holds messages: apply the tokenizer's chat template.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Generate anew, and keep nothing in the cache folder.")]
Samples = Annotated[int | None, typer.Option(help="Calibration sequences.", show_default="64")]
Length = Annotated[int | None, typer.Option(help="Tokens in each.", show_default="256")]
ExtraSamples = Annotated[
    int | None, typer.Option(help="Further sequences of the same text for the polish alone.", show_default="0; at 2 bits four times --samples")
]
Seed = Annotated[int | None, typer.Option(help="The same seed writes the same bytes.", show_default="0")]


def calibration_settings(settings: dict[str, Any], options: dict[str, Any], *, no_cache: bool) -> dict[str, Any]:
    """The `calibration` table of a configuration file's settings with the options that were given (neither None, False nor empty); nothing when none was."""
    text = {key: value for key, value in options.items() if value not in (None, []) and value is not False} | ({"cache": False} if no_cache else {})
    return {"calibration": {**table(settings, "calibration"), **text}} if text else {}


def table(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """A table of a configuration file's settings, an empty one where it isn't given. Raises ValueError for what is none."""
    found = settings.get(name)
    if not isinstance(found, dict | None):
        raise ValueError(f"config: {name} must be a table of names and values, got {found!r}")
    return found or {}


def read_settings(where: str, path: Path | None) -> dict[str, Any]:
    """What a JSON configuration file holds, nothing for None. Raises ValueError in one line for anything but a JSON object."""
    if path is None:
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{where}: config must be a JSON file, got {path} ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: config must be a JSON file, got {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: config must be a JSON object, got {type(settings).__name__}")
    return settings
