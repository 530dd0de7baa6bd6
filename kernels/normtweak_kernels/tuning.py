"""Launch configurations that were found the fastest on this GPU, in a file per GPU in the user's cache folder.

Nothing is tuned while a model runs: a measurement waits for the GPU, which the capture of CUDA graphs forbids, and would make the first tokens
of a process depend on chance. `tune` is called by `normtweak bench --warm`; every later process finds its choices by `chosen`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

logger = logging.getLogger(__name__)

Config = TypeVar("Config")


def folder() -> Path:
    """$XDG_CACHE_HOME/normtweak/launch or ~/.cache/normtweak/launch."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normtweak" / "launch"


@cache
def _file(index: int) -> Path:
    return folder() / (re.sub(r"\W+", "-", torch.cuda.get_device_name(index)) + ".json")


@cache
def _read(file: Path) -> dict[str, Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s can't be read (%s); kernels are launched as if nothing had been tuned", file, error)
        return {}
    return entries if isinstance(entries, dict) else {}


def key(op: str, regime: str, **values: object) -> str:
    """The name of a choice: the op, which of its lists, and all that the choice depends on."""
    return " ".join([op, regime, *(f"{name}={value}" for name, value in values.items())])


def chosen(name: str, configs: Sequence[Config], index: int | None) -> Config | None:
    """Of the configurations (dataclasses) the one that was noted under the name for the GPU with this index; None where none was, or is none of them."""
    if index is None:
        return None
    noted = _read(_file(index)).get(name)
    return None if noted is None else next((config for config in configs if asdict(config) == noted), None)  # type: ignore[call-overload]


def note(choices: Mapping[str, Any], index: int) -> Path:
    """Write choices (name -> configuration) into the GPU's file, beside what it holds already; the file is whole at any time."""
    file = _file(index)
    _read.cache_clear()
    entries = _read(file) | {name: asdict(config) for name, config in choices.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf8") as stream:
            json.dump(entries, stream, indent=1, sort_keys=True)
        os.replace(partial, file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    _read.cache_clear()
    return file


def seconds(call: Callable[[], object], repeats: int, warm_up: int = 1) -> list[float]:
    """Times of `repeats` calls on the current GPU, sorted, each after its caches were overwritten: weights come from memory while a model runs."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for _ in range(warm_up):
        call()
    events = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) / 1e3 for start, end in events)


def microseconds(call: Callable[[], object]) -> float:
    """Median time of 20 calls, see `seconds`."""
    return statistics.median(seconds(call, 20)) * 1e6


def tune(
    configs: Sequence[Config],
    run: Callable[[Config], object],
    does_not_fit: type[Exception],
    measure: Callable[[Callable[[], object]], float] = microseconds,
) -> tuple[Config, float]:
    """The fastest of the configurations, and its microseconds. Those for which `run` raises `does_not_fit` are left out; one must remain."""
    times: list[tuple[float, int]] = []
    for i, config in enumerate(configs):
        try:
            times.append((measure(lambda config=config: run(config)), i))  # type: ignore[misc]
        except does_not_fit:
            continue
    if not times:
        raise ValueError(f"tune: configs must hold one that fits the GPU, got {len(configs)} that don't")
    best, i = min(times)
    return configs[i], best
