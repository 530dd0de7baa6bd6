"""Fixed seeds, the models that tests share, and what is said of tests that can't run here."""

import importlib.util
import os
from collections import Counter

if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: two processes of two threads wait for one another's turns
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from normtweak_kernels import gpu
from small_models import make_model

# What the reason of a skip begins with where a test's needs aren't met, as opposed to a case that doesn't exist on this processor.
_NOT_RUN = "not run: "


def _missing(marker: str) -> str | None:
    """What tests with this marker want and this machine lacks."""
    if marker == "gpu":
        return None if torch.cuda.is_available() else "no GPU was found"
    if marker == "autoround":
        return None if importlib.util.find_spec("auto_round") else "the package auto-round isn't installed"
    from triton_checks import BESIDE, ENVIRONMENT, tools_folder

    return None if tools_folder() else f"ptx_check.py is neither in {BESIDE} nor in a folder that {ENVIRONMENT} names"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in ("ptx", "gpu", "autoround"):
        if item.get_closest_marker(marker) and (reason := _missing(marker)):
            pytest.skip(f"{_NOT_RUN}marked {marker}: {reason}")


def pytest_terminal_summary(terminalreporter) -> None:
    if gpu.why_missing():
        terminalreporter.write_line(f"NOT RUN: the tests of Triton's kernels: {gpu.why_missing()}", yellow=True, bold=True)
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.items():
        if reason.startswith(_NOT_RUN):
            terminalreporter.write_line(f"NOT RUN: {count} tests {reason.removeprefix(_NOT_RUN)}", yellow=True, bold=True)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory) -> None:
    """Text that tests generate is kept where it goes with them."""
    from normtweak.calibration import kept

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(kept, "cache_folder", lambda: folder)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """Folder of a small llama in float32, tied embeddings."""
    return make_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def embedded_model():
    """The embedded SmolLM2-135M's folder; where its package is missing the tests that need it fail and say how to install it."""
    from normtweak import models

    return models.resolve(models.EMBEDDED)
