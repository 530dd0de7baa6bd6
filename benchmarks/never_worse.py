"""A tweaked model is never worse: every base quantizer, width and grouping, with and without the default tweak, on text that no run has seen.

python benchmarks/never_worse.py [--model MODEL] [--methods rtn gptq] [--bits 2 3 4] [--groups -1 64] [--seeds 0 1 2] [--samples 64] [--length 256]

A line for a cell: KL(float || quantized) per token without and with the tweak on fresh self-generated text, their difference with its 95 % interval over
sequences, and what the tweak did. Exit code 1 when a model that was changed is worse.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import normtweak
from frontier import generated
from normtweak import QuantizeConfig, models
from normtweak.activations import compute_dtype
from normtweak.config import CalibrationConfig
from normtweak.estimates import paired_difference
from normtweak.evaluate import score

UNSEEN = 1000  # seed of the text that is measured on, beside the run's own


def divergences(folder: Path, exact: Any, tokenizer: Any, windows: Tensor) -> Tensor:
    """KL(float || quantized) per token of each window, nats, float64 [count]."""
    model = normtweak.load(folder)
    found = [score(model, tokenizer, window, against=exact, dtype=compute_dtype("auto")).kl for window in windows.split(1)]
    return torch.tensor(found, dtype=torch.float64)


def worse(cell: dict[str, Any], folder: models.ModelFolder, exact: Any, tokens: Tensor, windows: Tensor) -> bool:
    """Measure one cell, print its line."""
    with tempfile.TemporaryDirectory() as scratch:
        plain, tweaked = Path(scratch, "plain"), Path(scratch, "tweaked")
        normtweak.quantize(folder.path, out=plain, config=QuantizeConfig.preset(tweak=None, **cell), tokens=tokens)
        report = normtweak.quantize(folder.path, out=tweaked, config=QuantizeConfig.preset(**cell), tokens=tokens)
        before, after = (divergences(path, exact, folder.tokenizer, windows) for path in (plain, tweaked))
    difference = paired_difference(after, before)
    name = " ".join(f"{key} {value}" for key, value in cell.items())
    verdict = ("WORSE" if difference.value > 0 else "better") if report.norms_moved else "untouched"
    print(f"{name:60} {before.mean():8.4f} -> {after.mean():8.4f}   {difference}   {verdict}", flush=True)
    return verdict == "WORSE"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--groups", nargs="+", type=int, default=[-1, 64])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64, help="sequences calibrated on")
    parser.add_argument("--unseen", type=int, default=16, help="sequences measured on")
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    folder = models.ModelFolder(models.resolve(options.model))
    exact = models.load(folder.path)
    cells_worse = 0
    for seed in options.seeds:
        tokens = generated(folder, CalibrationConfig(samples=options.samples, length=options.length), seed)
        windows = generated(folder, CalibrationConfig(samples=options.unseen, length=options.length), seed + UNSEEN)
        for method in options.methods:
            for bits in options.bits:
                for group_size in options.groups:
                    # two bits are for grids with a zero point: centred on zero, they waste one of four levels
                    cell = {"method": method, "bits": bits, "group_size": group_size, "symmetric": bits > 2, "seed": seed}
                    cells_worse += worse(cell, folder, exact, tokens, windows)
    sys.exit(1 if cells_worse else 0)


if __name__ == "__main__":
    main()
