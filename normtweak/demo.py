"""The main job on the embedded model, end to end: `normtweak demo`."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from . import models
from .activations import compute_dtype
from .calibration import generated
from .checkpoint import check_out_folder
from .config import CalibrationConfig, QuantizeConfig, require
from .evaluate import PYTHON_DOCS, read_text, score, text_windows
from .pipeline import quantize
from .progress import Progress
from .text import continue_text

PROMPT = "The three most important things to know about the ocean are"
SCHEMES: dict[str, dict[str, Any]] = {
    "W4 per-channel": {"bits": 4, "group_size": -1, "symmetric": True},
    "W2 g64": {"bits": 2, "group_size": 64, "symmetric": False},
}
# Sequences generated beside the calibration text and kept out of it.
HELD_OUT = 4


def run(samples: int, length: int, out: Path | None, progress: Progress) -> Iterator[str | Table]:
    """Quantize SmolLM2-135M at W4 and W2, each with and without tweak and polish; yields lines as they come, then the table and the samples."""
    began = time.perf_counter()
    require(samples > 1, "demo", "samples", "2 or more, as the polish holds one out", samples)
    CalibrationConfig(samples=samples, length=length)  # complains before anything is generated
    if out is not None:
        check_out_folder(out)
    folder = models.ModelFolder(models.resolve(models.EMBEDDED))
    root = out or Path(tempfile.mkdtemp(prefix="normtweak-demo-"))
    root.mkdir(exist_ok=True)
    try:
        yield from _run(folder, samples, length, root, progress)
    finally:
        if out is None:
            shutil.rmtree(root)
    yield f"{time.perf_counter() - began:.0f} s in all" + (f"; checkpoints in {out}" if out else "")


def _run(folder: models.ModelFolder, samples: int, length: int, root: Path, progress: Progress) -> Iterator[str | Table]:
    tokenizer, precision = folder.tokenizer, compute_dtype("auto")
    docs = text_windows(tokenizer, read_text(PYTHON_DOCS), 40, 512)[::8]
    writer = models.load(folder.path, dtype=precision)
    tokens, held_out = generated.generate(writer, tokenizer, CalibrationConfig(samples=samples + HELD_OUT, length=length), 0, progress).split(
        [samples, HELD_OUT]
    )
    del writer
    reference = models.load(folder.path)
    table = Table("model", "perplexity (Python docs)", "KL to float (generated text)", "top-1 agreement", "MB", "seconds", title="SmolLM2-135M")
    texts = []

    def add(name: str, model: Any, megabytes: float, seconds: float | None) -> None:
        on_docs = score(model, tokenizer, docs, dtype=precision, progress=progress)
        beside = score(model, tokenizer, held_out, against=reference, dtype=precision, progress=progress)
        table.add_row(
            name,
            f"{on_docs.perplexity:.2f}",
            f"{beside.kl:.3f}",
            f"{beside.top1_agreement:.1%}",
            f"{megabytes:.0f}",
            f"{seconds:.0f}" if seconds else "-",
        )
        texts.append(f"{name}: {PROMPT}{continue_text(model, tokenizer, PROMPT, 40).text!r}")

    peak, first = 0, True
    for scheme, settings in SCHEMES.items():
        for tweaked in (False, True):
            recipe: dict[str, Any] = {"polish": {"extra_samples": 0}} if tweaked else {"tweak": None}
            config = QuantizeConfig.preset("default", **settings, **recipe, calibration={"samples": samples, "length": length})
            name = " + ".join([f"{scheme}, GPTQ", *(["tweak"] if config.tweak else []), *(["polish"] if config.polish else [])])
            yield f"\n{name}"
            target = root / name.replace(" ", "-").replace(",", "")
            report = quantize(models.EMBEDDED, out=target, config=config, tokens=tokens, progress=progress)
            peak = max(peak, report.peak_memory)
            if first:
                add("float (16-bit size)", reference, report.float_size / 1e6, None)
                first = False
            add(name, models.load(target), report.packed_size / 1e6, sum(report.seconds.values()))
    yield table
    yield from texts
    yield f"peak memory of a quantization: {peak / 1e9:.2f} GB above the process before it"
