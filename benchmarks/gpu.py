"""Runs the GPU benchmarks of gpu_<op>.py, prints a table and writes benchmarks/results/gpu_<op>.csv. Reports nothing when a GPU test fails.

python benchmarks/gpu.py [--op NAME ...]

A module gpu_<op>.py has cases(): an iterator of (case, moved, flops, variants), the bytes that must be read or written, the operations, and the
calls to be timed by name. Each call is timed after the GPU's caches were overwritten; the fraction of the roofline is that of this GPU's
measured bandwidth and 16-bit matrix product.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from normtweak_kernels.tuning import seconds

HERE = Path(__file__).parent
COLUMNS = ("case", "variant", "median_us", "p20_us", "p80_us", "gb_per_s", "tflop_per_s", "bandwidth_fraction", "peak_fraction", "roofline")
REPEATS = 50


def times(call: Callable[[], object]) -> list[float]:
    """Seconds of each of REPEATS calls, sorted."""
    return seconds(call, REPEATS, warm_up=3)


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: what it costs where a server replays it, without the time that Python takes to launch it."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def roofline() -> tuple[float, float]:
    """Bytes per second of a read, and operations per second of torch's bfloat16 product; measured."""
    data, a = torch.ones(2**28, device="cuda"), torch.randn(8192, 8192, device="cuda").bfloat16()
    return data.nbytes / statistics.median(times(data.sum)), 2 * 8192**3 / statistics.median(times(lambda: a @ a))


def rows(op: str, bandwidth: float, peak: float) -> list[dict[str, object]]:
    measured = []
    for case, moved, flops, variants in importlib.import_module(f"gpu_{op}").cases():
        for variant, call in variants.items():
            sample = times(graphed(call))
            median, p20, p80 = (sample[int(q * len(sample))] for q in (0.5, 0.2, 0.8))
            measured.append(
                {
                    "case": case,
                    "variant": variant,
                    "median_us": round(median * 1e6, 1),
                    "p20_us": round(p20 * 1e6, 1),
                    "p80_us": round(p80 * 1e6, 1),
                    "gb_per_s": round(moved / median / 1e9, 1),
                    "tflop_per_s": round(flops / median / 1e12, 2),
                    "bandwidth_fraction": round(moved / median / bandwidth, 3),
                    "peak_fraction": round(flops / median / peak, 3),
                    "roofline": round(max(moved / bandwidth, flops / peak) / median, 3),
                }
            )
    return measured


def main() -> int:
    names = sorted(path.stem.removeprefix("gpu_") for path in HERE.glob("gpu_*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="*", choices=names, default=names, help="which ops (default: all)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu: must be run on a machine with a GPU, got none: nothing is measured", file=sys.stderr)
        return 2
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(HERE.parent / "tests" / "kernels")]
    if subprocess.run(tests, check=False).returncode != 0:
        print("gpu: the GPU tests must pass, got a failure: nothing is reported", file=sys.stderr)
        return 1
    import triton

    bandwidth, peak = roofline()
    device = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {platform.system()}; "
        f"measured {bandwidth / 1e9:.0f} GB/s, {peak / 1e12:.0f} TFLOP/s bfloat16"
    )
    print(device)
    (HERE / "results").mkdir(exist_ok=True)
    for op in options.op:
        measured = rows(op, bandwidth, peak)
        print(f"\n{op}\n" + "\n".join("  ".join(str(row[column]) for column in COLUMNS) for row in measured))
        with (HERE / "results" / f"gpu_{op}.csv").open("w", newline="") as file:
            file.write(f"# {device}\n")
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
