"""The fixture `measure`: repeats a call, and notes what it moves and computes for run.py."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

SECONDS = 0.5  # measured per case


@contextmanager
def forced(backend: str | None) -> Iterator[None]:
    before = os.environ.pop("NORMTWEAK_BACKEND", None)
    if backend:
        os.environ["NORMTWEAK_BACKEND"] = backend
    yield
    os.environ.pop("NORMTWEAK_BACKEND", None)
    if before is not None:
        os.environ["NORMTWEAK_BACKEND"] = before


@pytest.fixture
def measure(benchmark):
    def run(call: Callable[[], object], *, op: str, variant: str, case: str, moved: int, flops: int = 0) -> None:
        """variant: "reference" or "cpp", which forces that backend, or a baseline's name. moved: bytes that must be read or written."""
        with forced(variant if variant in ("reference", "cpp") else None):
            call()
            start = time.perf_counter()
            call()
            rounds = int(min(max(SECONDS / (time.perf_counter() - start), 1), 200))
            benchmark.extra_info.update(op=op, variant=variant, case=case, moved=moved, flops=flops)
            benchmark.pedantic(call, rounds=rounds)

    return run
