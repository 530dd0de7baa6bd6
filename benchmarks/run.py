"""Runs the benchmarks, prints a table and writes benchmarks/results/<op>.csv. Reports nothing when a test of the ops fails.

python benchmarks/run.py [--op NAME ...] [--filter EXPRESSION]
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from normtweak_kernels import native

HERE = Path(__file__).parent
COLUMNS = ("case", "variant", "median_us", "p20_us", "p80_us", "gb_per_s", "gflop_per_s", "roofline", "rounds")


def fastest(call, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def roofline() -> tuple[float, float]:
    """Bytes per second that this machine reads, and float32 operations per second of its best matrix product; measured."""
    data, a = torch.ones(2**26), torch.randn(1536, 1536)
    return data.nbytes / fastest(data.sum), 2 * 1536**3 / fastest(lambda: a @ a)


def row(entry: dict, bandwidth: float, peak: float) -> dict[str, object]:
    info, times = entry["extra_info"], sorted(entry["stats"]["data"])

    def quantile(q: float) -> float:
        return times[min(int(q * len(times)), len(times) - 1)]

    median = quantile(0.5)
    return {
        "op": info["op"],
        "case": info["case"],
        "variant": info["variant"],
        "median_us": round(median * 1e6, 1),
        "p20_us": round(quantile(0.2) * 1e6, 1),
        "p80_us": round(quantile(0.8) * 1e6, 1),
        "gb_per_s": round(info["moved"] / median / 1e9, 2),
        "gflop_per_s": round(info["flops"] / median / 1e9, 2),
        # The time that the slower of memory and float32 arithmetic needs at least; above 1 where caches or bfloat16 help.
        "roofline": round(max(info["moved"] / bandwidth, info["flops"] / peak) / median, 3),
        "rounds": len(times),
    }


def table(rows: list[dict[str, object]]) -> str:
    cells = [COLUMNS, *(tuple(str(r[c]) for c in COLUMNS) for r in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    parser.add_argument("--op", nargs="*", choices=names, default=names, help="which ops (default: all)")
    parser.add_argument("--filter", default="", help="pytest's -k expression, e.g. 576")
    options = parser.parse_args()

    pytest = [sys.executable, "-m", "pytest", "-q"]
    tests = [str(HERE.parent / "tests" / "kernels" / f"test_{name}.py") for name in options.op]
    if subprocess.run([*pytest, *tests], check=False).returncode != 0:
        print("run: the tests of the ops must pass, got a failure: nothing is reported", file=sys.stderr)
        return 1
    bandwidth, peak = roofline()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        files = [str(HERE / f"bench_{name}.py") for name in options.op]
        arguments = ["-p", "no:cacheprovider", "--benchmark-disable-gc", "--benchmark-quiet", f"--benchmark-json={output}", "-k", options.filter]
        if subprocess.run([*pytest, *files, *arguments], check=False, stdout=subprocess.DEVNULL).returncode != 0:
            print(f"run: a benchmark failed: {' '.join([*pytest, *files])}", file=sys.stderr)
            return 1
        result = json.loads(output.read_text())

    module = native.module()
    cpu = result["machine_info"].get("cpu", {}).get("brand_raw", platform.processor())
    device = (
        f"{cpu}, {torch.get_num_threads()} threads, {module.isa() if module else 'no native kernels'}, torch {torch.__version__}; "
        f"measured roofline {bandwidth / 1e9:.1f} GB/s, {peak / 1e9:.0f} GFLOP/s float32"
    )
    print(device)
    (HERE / "results").mkdir(exist_ok=True)
    for name in options.op:
        rows = sorted(
            (row(entry, bandwidth, peak) for entry in result["benchmarks"] if entry["extra_info"]["op"] == name), key=lambda r: str(r["case"])
        )
        if not rows:
            continue
        print(f"\n{name}\n{table(rows)}")
        with (HERE / "results" / f"{name}.csv").open("w", newline="") as file:
            file.write(f"# {device}\n")
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
