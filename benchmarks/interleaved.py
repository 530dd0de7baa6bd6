"""Contenders in turn, round after round, so that a drift of the machine meets all of them alike and ratios of medians hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def medians(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each contender: the median over `rounds`, after one call that isn't counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def table(title: str, seconds: dict[str, float], baseline: str) -> str:
    """Milliseconds, and how many times as fast as `baseline` each contender is."""
    width = max(map(len, seconds))
    lines = [f"  {name:{width}}  {s * 1e3:9.2f} ms  {seconds[baseline] / s:7.2f} x {baseline}" for name, s in seconds.items()]
    return "\n".join([title, *lines])
