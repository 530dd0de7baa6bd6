"""Ratios of an op's variants: every round calls each of them once, in turn, so that a machine's drift meets them all alike.

python benchmarks/ratios.py gptq_solve inverse_cholesky hessian_update [--rounds 7] [--filter 4096]
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

from conftest import forced
from interleaved import medians


def forcing(variant: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call with its variant's backend."""

    def run() -> None:
        with forced(variant if variant in ("reference", "cpp") else None):
            call()

    return run


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
            seconds = medians({variant: forcing(variant, call) for variant, call in calls.items()}, options.rounds)
            for variant, median in seconds.items():
                ratio = median / seconds["cpp"]
                print(f"{op}  {info['case']:36}  {variant:44}  {median * 1e3:9.2f} ms  {ratio:6.2f} x cpp", flush=True)


if __name__ == "__main__":
    main()
