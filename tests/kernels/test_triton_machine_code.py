"""benchmarks/kernels.json, the launches whose machine code inspect_kernels reads, and what it must say of them."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from triton_checks import tool

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MANIFEST = json.loads((BENCHMARKS / "kernels.json").read_text(encoding="utf8"))
LOAD = re.compile(r"LDGSTS|LDG\b|global_load|buffer_load")
# Lower bounds on the static share of the tensor cores' peak for the launches that run where nothing was tuned, and on the share of wide loads.
CEILED = ("sm_80", "sm_90")
LEAST_CEILING = 0.75
LEAST_WIDE = 0.9
# Of AMD's wavefronts a lane has one word only of the plane of 3-bit codes' high bits: two of the seven or more loads of a step.
LEAST_WIDE_AMD_3_BITS = 0.7


def manifest():
    spec = importlib.util.spec_from_file_location("manifest", BENCHMARKS / "manifest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_manifest_holds_what_launch_py_does():
    assert (BENCHMARKS / "kernels.json").read_text(encoding="utf8") == manifest().text(), "run python benchmarks/manifest.py"


def test_every_launch_of_every_list_is_in_it():
    from normtweak_kernels.launch import DEQUANT_GEMM_GPU

    for target in MANIFEST["targets"]:
        lists = DEQUANT_GEMM_GPU[target]
        compiled = {
            (one["const"]["BLOCK_M"], one["const"]["BLOCK_N"], one["opt"]["num_warps"], one["opt"]["num_stages"])
            for one in MANIFEST["kernels"]
            if target in one["targets"] and "BLOCK_N" in one["const"] and "num_stages" in one["opt"]
        }
        firsts = (*lists.many_rows_first.values(), *lists.backward_first.values())
        shipped = (*lists.few_rows, *lists.many_rows, *lists.int8, *lists.backward, *firsts)
        assert {(c.block_m, c.block_n, c.num_warps, c.num_stages) for c in shipped} <= compiled


def examine(entry, target, monkeypatch):
    """inspect_kernels' row, with the loads of the hottest loop (of the kernel where that has none) of 8 bytes or more, and all of them.

    The tool takes LDGDEPBAR, which waits for asynchronous copies, for a load of 4 bytes: here it is named as what it is. What a kernel loads before its
    loop (tables of shifts, parameters of a channel) is loaded once and not counted where there is a loop.
    """
    inspect_kernels = tool("inspect_kernels")
    parse, hot_loop, seen = inspect_kernels.parse_sass, inspect_kernels.hot_loop, {}

    def named(text):
        code, labels = parse(text)
        return [("DEPBAR" if opcode.startswith("LDGDEPBAR") else opcode, jump) for opcode, jump in code], labels

    def kept(code, *arguments):
        seen["loop"] = hot_loop(code, *arguments)
        seen["code"] = [opcode for opcode, _ in code]
        return seen["loop"]

    monkeypatch.setattr(inspect_kernels, "parse_sass", named)
    monkeypatch.setattr(inspect_kernels, "hot_loop", kept)
    row = inspect_kernels.examine(entry, target, BENCHMARKS)
    assert not row["failures"], (entry["name"], target, entry["const"], row["failures"])
    loads = [opcode for opcode in seen["loop"] if LOAD.match(opcode)] or [opcode for opcode in seen["code"] if LOAD.match(opcode)]
    sizes = [inspect_kernels.access_bytes(opcode) for opcode in loads]
    return row, sum(size >= 8 for size in sizes), len(sizes)


def runs_untuned(entry, target):
    """Whether a product's launch is the first of its weight's list, which runs where nothing was tuned."""
    from normtweak_kernels.launch import DEQUANT_GEMM_GPU

    const = entry["const"]
    lists, weight = DEQUANT_GEMM_GPU[target], (const["BITS"], 2 if const["GROUP_SIZE"] else 1)
    first = (lists.gradients(*weight) if entry["name"] == "dequant_gemm backward" else lists.products(*weight))[0]
    return (const["BLOCK_M"], const["BLOCK_N"], entry["opt"]["num_stages"]) == (first.block_m, first.block_n, first.num_stages)


def check(entry, target, monkeypatch):
    row, wide, loads = examine(entry, target, monkeypatch)
    if entry["name"] in ("dequant_gemm many rows", "dequant_gemm backward") and target in CEILED and runs_untuned(entry, target):
        assert row["tensor_ceiling"] >= LEAST_CEILING, (entry, target, row["tensor_ceiling"])
    few_high_bits = target.startswith("gfx") and entry["name"].startswith("dequant_gemm ") and entry["const"].get("BITS") == 3
    assert wide >= (LEAST_WIDE_AMD_3_BITS if few_high_bits else LEAST_WIDE) * loads, (entry, target, wide, loads)
    return wide, loads


@pytest.mark.ptx
@pytest.mark.parametrize("target", MANIFEST["targets"])
def test_the_first_launch_for_many_rows(target, monkeypatch):
    entry = next(
        one
        for one in MANIFEST["kernels"]
        if one["name"] == "dequant_gemm many rows" and target in one["targets"] and one["const"]["BITS"] == 4 and one["const"]["GROUP_SIZE"] == 64
    )
    wide, loads = check(entry, target, monkeypatch)
    assert wide == loads > 0


@pytest.mark.ptx
@pytest.mark.slow
@pytest.mark.parametrize("target", MANIFEST["targets"])
def test_every_launch(target, monkeypatch):
    """No spills, tensor instructions, 8 warps a multiprocessor, wide loads; on sm_80 and sm_90 the ceilings."""
    for entry in MANIFEST["kernels"]:
        if target in entry["targets"]:
            with monkeypatch.context() as patch:
                check(entry, target, patch)
