"""Whole jobs on the embedded model beside what people use instead.

python benchmarks/end_to_end.py generation FOLDER           a packed checkpoint beside the float model in bfloat16, both by transformers
python benchmarks/end_to_end.py quantize TEXT [--peer PYTHON]   CPU seconds of `normtweak quantize` and of gptqmodel, which PYTHON can import

Pin the process for one thread: OMP_NUM_THREADS=1 taskset -c 0.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from normtweak import models

PROMPT = "The three most important things to know about the ocean are"
SAMPLES, LENGTH = 64, 512

# Runs in the peer's own environment: argv is the float model's folder, the text, where to write.
GPTQMODEL = """
import sys
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer
torch.set_num_threads(1)
folder, text, out = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(folder)(open(text, encoding="utf8").read(), return_tensors="pt").input_ids[0]
rows = [{"input_ids": ids[i * 512 : (i + 1) * 512].tolist(), "attention_mask": [1] * 512} for i in range(64)]
model = GPTQModel.load(folder, QuantizeConfig(bits=4, group_size=-1, act_group_aware=False, desc_act=False), device="cpu")
model.quantize(rows, batch_size=8)
model.save(out)
"""


def generation(folder: str, rounds: int) -> None:
    """Tokens per second at batch 1 and of a prompt of 512 tokens, medians of interleaved rounds."""
    embedded = models.ModelFolder(models.resolve(models.EMBEDDED))
    contenders = {
        "float, bfloat16": models.load(embedded.path, dtype=torch.bfloat16),
        "packed, bfloat16": models.load(folder, dtype=torch.bfloat16),
        "packed, float32": models.load(folder, dtype=torch.float32),
        "packed, bfloat16, int8": models.load(folder, dtype=torch.bfloat16, activations="int8"),
    }
    ids = embedded.tokenizer(PROMPT, return_tensors="pt").input_ids
    prompt = torch.randint(0, embedded.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0))
    decode: dict[str, list[float]] = {name: [] for name in contenders}
    prefill: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode():
        for counted in range(-1, rounds):
            for name, model in contenders.items():
                start = time.perf_counter()
                model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)
                middle = time.perf_counter()
                model(prompt)
                if counted >= 0:
                    decode[name].append(32 / (middle - start))
                    prefill[name].append(512 / (time.perf_counter() - middle))
    for name in contenders:
        tokens, fed = statistics.median(decode[name]), statistics.median(prefill[name])
        base, fed_base = statistics.median(decode["float, bfloat16"]), statistics.median(prefill["float, bfloat16"])
        print(f"{name:24} {tokens:7.1f} tokens/s ({tokens / base:.2f})   prompt {fed:7.0f} tokens/s ({fed / fed_base:.2f})")


def cpu_seconds(command: list[str], environment: dict[str, str]) -> float:
    before = os.times()
    subprocess.run(command, check=True, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def quantize(text: str, peer: str | None) -> None:
    """W4 per channel on 64 x 512 tokens of a text, the whole command from start to checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        base = ["-m", "normtweak", "quantize", models.EMBEDDED, "--calibration", text, "--samples", str(SAMPLES), "--length", str(LENGTH)]
        seconds = {
            "normtweak, no tweak": cpu_seconds([sys.executable, *base, "--no-tweak", "--out", str(out / "plain")], {}),
            "normtweak": cpu_seconds([sys.executable, *base, "--out", str(out / "tweaked")], {}),
        }
        if peer is not None:
            embedded = models.ModelFolder(models.resolve(models.EMBEDDED))
            models.load(embedded.path, dtype=torch.bfloat16).save_pretrained(out / "float")
            embedded.tokenizer.save_pretrained(out / "float")
            # with fewer it crashes on two cores
            seconds["gptqmodel"] = cpu_seconds([peer, "-c", GPTQMODEL, str(out / "float"), text, str(out / "peer")], {"GPTQMODEL_CPU_WORKERS": "2"})
    for name, value in seconds.items():
        ratio = f"   {value / seconds['gptqmodel']:.2f} x gptqmodel" if peer else ""
        print(f"{name:24} {value:7.1f} CPU seconds{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("generation")
    job.add_argument("folder")
    job.add_argument("--rounds", type=int, default=7)
    job = jobs.add_parser("quantize")
    job.add_argument("text")
    job.add_argument("--peer", help="a Python that can import gptqmodel")
    options = parser.parse_args()
    if options.job == "generation":
        generation(options.folder, options.rounds)
    else:
        quantize(options.text, options.peer)


if __name__ == "__main__":
    main()
