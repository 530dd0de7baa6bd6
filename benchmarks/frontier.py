"""Perplexity over CPU seconds: recipes on the embedded model (or another), with one calibration text per seed for all of them.

python benchmarks/frontier.py [--cells w4 w2g64] [--recipes untweaked default] [--seeds 0 1 2] [--text FILE ...] [--keep FOLDER] [--csv FILE]

A row: what a recipe took (CPU seconds of its run in this process, the text's own generation apart), the perplexity of each text, and the share of the base
quantizer's loss of log-perplexity that it won back, (ln untweaked - ln recipe) / (ln untweaked - ln float). Pin the process for one thread: OMP_NUM_THREADS=1 taskset -c 0.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import normtweak
from normtweak import QuantizeConfig, models
from normtweak.activations import CPU, compute_dtype
from normtweak.config import CalibrationConfig
from normtweak.evaluate import PYTHON_DOCS, read_text, score, text_windows
from normtweak.progress import Silent
from normtweak.sequences import calibration_text, extra_samples

CELLS: dict[str, dict[str, Any]] = {
    "w4": {"bits": 4},
    "w4g64": {"bits": 4, "group_size": 64},
    "w3g64": {"bits": 3, "group_size": 64},
    "w2g64": {"bits": 2, "group_size": 64, "symmetric": False},
    "awq-w4": {"method": "awq", "bits": 4},
    "awq-w4g64": {"method": "awq", "bits": 4, "group_size": 64},
    "awq-w2g64": {"method": "awq", "bits": 2, "group_size": 64, "symmetric": False},
    "awq-gptq-w4": {"method": "awq", "bits": 4, "rounding": "gptq"},
    "w8a8": {"method": "smoothquant", "bits": 8},
    "w5a8": {"method": "smoothquant", "bits": 5},
    "w4a8": {"method": "smoothquant", "bits": 4},
    "gptq-w4a8": {"method": "smoothquant", "bits": 4, "rounding": "gptq"},
}
# What each recipe asks for beside the default preset.
RECIPES: dict[str, dict[str, Any]] = {
    "untweaked": {"tweak": None, "polish": None},
    "plain gptq": {"tweak": None, "polish": None, "sequential": False, "correction": 0.0},
    "correction 1": {"tweak": None, "polish": None, "correction": 1.0},
    "tweak": {"polish": None},
    "default": {},
    "tweak and polish": {"tweak": {}},
    "polish": {"tweak": None, "polish": {}},
    "polish, 4 passes": {"tweak": None, "polish": {"iterations": 4}},
    "no extra text": {"polish": {"extra_samples": 0}},
    "published gptq": {"tweak": None, "polish": None, "sequential": False, "correction": 0.0, "act_order": False, "clip_steps": 0},
    "rates searched": {"tweak": {"learning_rate": None}, "polish": {"learning_rate": None}},
}
FIELDS = ("cell", "recipe", "seed", "cpu_seconds", "text", "perplexity", "recovered")


def generated(folder: models.ModelFolder, config: CalibrationConfig, seed: int) -> Tensor:
    """The calibration text of a seed."""
    return calibration_text(folder, QuantizeConfig(calibration=config, seed=seed), CPU)(Silent()).tokens


def perplexities(model: Any, tokenizer: Any, windows: dict[str, Tensor]) -> dict[str, float]:
    """Of a model on each text."""
    return {name: score(model, tokenizer, own, dtype=compute_dtype("auto")).perplexity for name, own in windows.items()}


def recipe_of(cell: str, recipe: str, seed: int) -> QuantizeConfig:
    """A recipe's settings in a cell."""
    return QuantizeConfig.preset(seed=seed, **CELLS[cell], **RECIPES[recipe])


def rows_of(
    cell: str, seed: int, recipes: list[str], folder: models.ModelFolder, tokens: Tensor, extra: Tensor, windows: dict[str, Tensor],
    exact: dict[str, float], keep: Path,
):  # fmt: skip
    """Measure the recipes of one cell, each after the base quantizer alone; yields one row for each text.

    extra: what the polish may have beside the tokens. exact: the float model's perplexities.
    """
    base: dict[str, float] = {}
    for recipe in ["untweaked", *(name for name in recipes if name != "untweaked")]:
        out = keep / f"{cell}-{recipe.replace(', ', '-').replace(' ', '-')}-{seed}"
        config = recipe_of(cell, recipe, seed)
        further = extra[: extra_samples(config.polish)]
        began = time.process_time()
        normtweak.quantize(folder.path, out=out, config=config, tokens=tokens, extra_tokens=further if len(further) else None)
        seconds = time.process_time() - began
        found = perplexities(normtweak.load(out), folder.tokenizer, windows)
        base = base or found
        for text, value in found.items():
            recovered = (math.log(base[text]) - math.log(value)) / (math.log(base[text]) - math.log(exact[text]))
            yield dict(zip(FIELDS, (cell, recipe, seed, round(seconds, 1), text, round(value, 3), round(recovered, 3)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--cells", nargs="+", default=["w4", "w2g64"], choices=list(CELLS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--tokens", help="calibration text instead: a safetensors file with the tensor `tokens`; {seed} in its name stands for the seed"
    )
    parser.add_argument("--text", nargs="+", default=[PYTHON_DOCS], help="files to measure perplexity on; python-docs is the language reference")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--every", type=int, default=1, help="measure every n-th window alone")
    parser.add_argument("--keep", type=Path, help="leave the checkpoints in this folder")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    folder = models.ModelFolder(models.resolve(options.model))
    windows = {text: text_windows(folder.tokenizer, read_text(text), options.windows, 512)[:: options.every] for text in options.text}
    exact = perplexities(models.load(folder.path), folder.tokenizer, windows)
    print("float: " + ", ".join(f"{value:.3f} ({text})" for text, value in exact.items()))
    rows = []
    print(f"{'cell':11} {'recipe':18} {'seed':>4} {'CPU s':>7} {'perplexity':>11} {'recovered':>10}  text")
    with tempfile.TemporaryDirectory() as scratch:
        keep = options.keep or Path(scratch)
        keep.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            most = max(extra_samples(recipe_of(cell, recipe, seed).polish) for cell in options.cells for recipe in options.recipes)
            config = CalibrationConfig(samples=options.samples + most, length=options.length)
            text = load_file(options.tokens.format(seed=seed))["tokens"] if options.tokens else generated(folder, config, seed)
            tokens, extra = text[: options.samples], text[options.samples :]
            for cell in options.cells:
                for row in rows_of(cell, seed, options.recipes, folder, tokens, extra, windows, exact, keep):
                    rows.append(row)
                    values = (row["cell"], row["recipe"], row["seed"], row["cpu_seconds"], row["perplexity"], row["recovered"], row["text"])
                    print("{:11} {:18} {:>4} {:7.1f} {:11.3f} {:10.1%}  {}".format(*values), flush=True)
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
