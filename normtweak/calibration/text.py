"""Calibration text from a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CalibrationConfig, require
from . import with_bos


def read_utf8(where: str, path: Path) -> str:
    """The text of a file, without a byte order mark. Raises ValueError, named after `where`, when it isn't UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {path} must be UTF-8 text, got bytes that aren't ({error.reason} at byte {error.start})") from error


def json_lines(where: str, path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a JSONL file that hold something, and their numbers. A newline alone ends one: U+2028 and others at which str.splitlines cuts may stand in a string."""
    for number, line in enumerate(read_utf8(where, path).split("\n"), 1):
        if line.strip():
            yield number, line


def windows(config: CalibrationConfig, tokenizer: Any, seed: int) -> Tensor:
    """Windows int64 [samples, length] at random places of a UTF-8 text file. Raises ValueError when it is missing, not text, or too short."""
    path = Path(config.source)
    require(path.is_file(), "calibration", "source", "generated, random or a text file", config.source)
    ids = torch.tensor(tokenizer(read_utf8("calibration", path), add_special_tokens=False).input_ids)
    require(
        len(ids) >= config.samples * config.length, "calibration", str(path),
        f"at least samples x length = {config.samples * config.length} tokens long", f"{len(ids)} tokens",
    )  # fmt: skip
    starts = torch.randperm(len(ids) // config.length, generator=torch.Generator().manual_seed(seed))[: config.samples] * config.length
    return with_bos(torch.stack([ids[start : start + config.length] for start in starts.sort().values.tolist()]), tokenizer)
