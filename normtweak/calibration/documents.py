"""Calibration text from documents: lines of a JSONL file or rows of a dataset, plain text or conversations."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CalibrationConfig, require
from . import hub, with_bos
from .text import json_lines

# What stands between two documents in one sequence.
_BETWEEN = "\n\n"


def sequences(config: CalibrationConfig, tokenizer: Any, seed: int) -> Tensor:
    """Sequences int64 [samples, length] of documents in random order: each begins where a document begins, goes on with the next ones, and is cut at `length`.

    A conversation is what the tokenizer's chat template makes of its messages; plain documents in one sequence are separated by an empty line. Raises
    ValueError when there are too few, or one isn't text (messages).
    """
    field = config.field or ("messages" if config.chat else "text")
    require(
        not config.chat or bool(getattr(tokenizer, "chat_template", None)), "calibration", "chat", "off for a tokenizer without a chat template", "on"
    )
    if config.source.startswith("hf:"):
        rows: Iterable[tuple[str, Any]] = hub.rows(config, seed)
    else:
        rows = _lines(Path(config.source), field)
    form = (lambda place, row: _conversation(place, row, field, tokenizer)) if config.chat else (lambda place, row: _document(place, row, field))
    documents: Iterable[str] = (form(place, row) for place, row in _filled(rows, field))
    if not config.source.startswith("hf:"):  # a dataset comes in random order
        lines = list(documents)
        random.Random(seed).shuffle(lines)
        documents = lines
    ids = _pack(config, documents, tokenizer)
    return ids if config.chat else with_bos(ids, tokenizer)


def _lines(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    require(path.is_file(), "calibration", "source", "generated, random, a text file, a .jsonl file or hf:NAME", path)
    for number, line in json_lines("calibration", path):
        place = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"calibration: {place} must be a JSON object with {field}, got {error}") from None
        yield place, row


def _filled(rows: Iterable[tuple[str, Any]], field: str) -> Iterator[tuple[str, Any]]:
    for place, row in rows:
        there = isinstance(row, dict) and field in row
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        require(there, "calibration", place, f"an object with the field {field} (see --field)", keys)
        if row[field]:
            yield place, row


def _document(place: str, row: dict[str, Any], field: str) -> str:
    require(isinstance(row[field], str), "calibration", f"{place}, {field},", "text (messages need --chat)", type(row[field]).__name__)
    return row[field] + _BETWEEN


def _conversation(place: str, row: dict[str, Any], field: str, tokenizer: Any) -> str:
    from jinja2 import TemplateError

    messages = row[field]
    good = isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages)
    require(good, "calibration", f"{place}, {field},", "a list of messages with role and content", type(messages).__name__)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"calibration: {place} must be messages that the chat template takes, got {type(error).__name__}: {error}") from None


def _pack(config: CalibrationConfig, documents: Iterable[str], tokenizer: Any) -> Tensor:
    finished: list[list[int]] = []
    current: list[int] = []
    for document in documents:
        current += tokenizer(document, add_special_tokens=False).input_ids
        if len(current) >= config.length:
            finished.append(current[: config.length])
            current = []
        if len(finished) == config.samples:
            return torch.tensor(finished)
    wanted = f"enough documents for {config.samples} sequences of {config.length} tokens"
    raise ValueError(f"calibration: {config.source} must be {wanted}, got enough for {len(finished)}")
