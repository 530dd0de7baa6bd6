"""Our packed product beside its peers' (ATen int4pack, ONNX Runtime, OpenVINO, Intel's auto-round kernels), interleaved, with a probe of the
memory and one of bfloat16 products. `make bench-peers` installs the peers and runs this.

python benchmarks/peers.py [--cases "W4 g64"] [--threads 1] [--rounds 9]

Needs the harness `peers.py`, found in the folder NORMTWEAK_TOOLS or in ../shared/tools beside the repository. Pin the process: taskset -c 0.
Weights go round through 160 MB at up to 16 rows of x, so that they are read from memory, except in the cases "in cache", which fit a large one.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import platform
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

import ours
from normtweak_kernels import native

HERE = Path(__file__).parent
MODES = {"ours (float32)": ours.factory, "ours (bfloat16)": ours.bfloat16, "ours (int16)": ours.int16, "ours (int8)": ours.int8}
# name -> bits, group size, shape, rows of x
CASES = {
    "W4 g64": (4, 64, "4096x4096", [1, 4, 16, 64, 256, 1024]),
    "W2 g64": (2, 64, "4096x4096", [1, 4, 16]),
    "W3 g64": (3, 64, "4096x4096", [1, 16]),
    "W8 g64": (8, 64, "4096x4096", [1, 16]),
    "W4 g128": (4, 128, "4096x4096", [1, 16]),
    "W4 per channel": (4, 4096, "4096x4096", [1, 16]),
    "W4 g64 576x1536 in cache": (4, 64, "576x1536", [1, 16]),
    "W4 g64 1536x576 in cache": (4, 64, "1536x576", [1, 16]),
}


def harness():
    """The module peers.py with our modes among its peers."""
    path = Path(os.environ.get("NORMTWEAK_TOOLS", HERE.parent.parent / "shared" / "tools")) / "peers.py"
    if not path.is_file():
        sys.exit(f"peers: the harness peers.py must lie in NORMTWEAK_TOOLS or ../shared/tools, got no {path.name} there")
    spec = importlib.util.spec_from_file_location("harness", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("ort_acc0", "ort_acc4"):  # raise for other groups, in an exception of their own
        module.PEERS[name] = partial(_up_to_256, module.PEERS[name])
    module.PEERS |= MODES
    return module


def _up_to_256(factory, q, scales, zeros, group, bits):
    return factory(q, scales, zeros, group, bits) if group <= 256 else None


def run(module, name: str, threads: int, rounds: int) -> list[dict[str, object]]:
    bits, group, shape, row_counts = CASES[name]
    with tempfile.NamedTemporaryFile() as file:
        arguments = ["--bits", str(bits), "--group", str(group), "--shape", shape, "--m", *map(str, row_counts)]
        sys.argv = ["peers.py", *arguments, "--threads", str(threads), "--rounds", str(rounds), "--json", file.name]
        module.main()
        measured = json.loads(Path(file.name).read_text())["rows"]
    return [
        {"case": name, "threads": threads, "m": r["m"], "variant": r["name"], "median_us": round(r["us"], 1), "error": r["err"] and f"{r['err']:.1e}"}
        for r in measured
    ]


def summary(rows: list[dict]) -> str:
    """For each case and number of rows: the best peer of each precision over ours, and the probe of the memory over ours."""
    lines = []
    for case, m in dict.fromkeys((row["case"], row["m"]) for row in rows):
        times = {row["variant"]: row["median_us"] for row in rows if (row["case"], row["m"]) == (case, m)}
        peers = {name: time for name, time in times.items() if name not in MODES and name not in ("stream", "probe")}
        rounded = {"ort_acc4", "openvino_dq64", "autoround_int8"}  # int8 activations
        near = min((name for name in peers if name not in rounded), key=peers.__getitem__, default=None)
        coarse = min((name for name in peers if name in rounded), key=peers.__getitem__, default=None)
        for mode in MODES:
            best = [coarse] if mode == "ours (int8)" else [near]
            ratios = [f"{peers[name] / times[mode]:.2f} x {name}" for name in best if name]
            lines.append(
                f"{case:20} M={m:<5} {mode:16} {times[mode]:10.1f} us   {'  '.join(ratios):24} {times['stream'] / times[mode]:.2f} of stream"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    module, rows = harness(), []
    for name in options.cases:
        print(f"\n{name}, {options.threads} threads", flush=True)
        rows += run(module, name, options.threads, options.rounds)
        write(rows, options.threads)  # a peer that fails later loses nothing
    print(f"\n{summary(rows)}")


def write(rows: list[dict], threads: int) -> None:
    """benchmarks/results/peers_<threads>.csv."""
    path = HERE / "results" / f"peers_{threads}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {platform.machine()}, {native.loaded().isa()}, torch {torch.__version__}\n")
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
