"""Ratios of an op's variants: every round calls each of them once, in turn, so that a machine's drift meets them all alike.

python benchmarks/ratios.py gptq_solve inverse_cholesky hessian_update [--rounds 7] [--filter 4096]
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time

from conftest import forced


def race(calls, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call of each variant, after one that isn't counted."""
    times: dict[str, list[float]] = {variant: [] for variant in calls}
    for counted in range(-1, rounds):
        for variant, call in calls.items():
            with forced(variant if variant in ("reference", "cpp") else None):
                start = time.perf_counter()
                call()
                if counted >= 0:
                    times[variant].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="+", help="ops whose bench_<op>.py has CASES")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--filter", default="", help="only cases whose name holds this")
    options = parser.parse_args()
    for op in options.ops:
        module = importlib.import_module(f"bench_{op}")
        for case in module.CASES:
            make, shape = case if callable(case[0]) else (module.make, case)
            calls, info = make(*shape)
            if options.filter not in info["case"]:
                continue
            medians = {variant: statistics.median(times) for variant, times in race(calls, options.rounds).items()}
            for variant, median in medians.items():
                ratio = median / medians["cpp"]
                print(f"{op}  {info['case']:36}  {variant:44}  {median * 1e3:9.2f} ms  {ratio:6.2f} x cpp", flush=True)


if __name__ == "__main__":
    main()
