"""Faults planted into the compiled PTX: the simulator or the comparison with float64 must find them.

A mutant lacks one barrier or one wait for an asynchronous copy, or one of its comparisons includes equality where it didn't, or the other way round.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import linecache
import re

import pytest
import torch

from accuracy import assert_accurate
from normtweak_kernels import hessian_update, launch
from normtweak_kernels.gptq_block_update import reference as update_reference
from normtweak_kernels.hessian_update import reference as hessian_reference
from triton_checks import simulated

BARRIER = re.compile(r"\b(bar\.sync|barrier\.sync|cp\.async\.wait_group|cp\.async\.wait_all)\b")
ACCESS = re.compile(r"\b(ld|st)\.shared\S*\s[^\[]*\[(\S+?)[+\]]")
COMPARISON = re.compile(r"\bsetp\.(lt|le|gt|ge|lo|ls|hi|hs)(u?)\.")
OTHER = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "lo": "ls", "ls": "lo", "hi": "hs", "hs": "hi"}
TARGET = 0.9


# Faults that change nothing, by the line of the kernel that they are in and what they hit.
EQUIVALENT = [
    # A further pass would have every element masked: it reads nothing and adds zeros.
    (re.compile(r"for start in range\(0, \w+, BLOCK_\w\)"), re.compile(r"setp")),
    # The guard of a loop that may have no pass. Triton compiles a number of 1 into another kernel, and 0 the bodies don't launch.
    (re.compile(r"for \w+ in range\("), re.compile(r"setp\.[lg][te]\.s32\s+\S+, \S+, [01];")),
    # The column itself gets its quantized value, whatever the comparison with the later columns says of it.
    (re.compile(r"w = tl\.where\(here, quantized"), re.compile(r"setp")),
]


def changes_nothing(lines, number, source):
    """Whether the fault in this line can't have an effect."""
    line = lines[number].strip()
    if any(where.search(source) and what.search(line) for where, what in EQUIVALENT):
        return True
    if not BARRIER.search(line):
        return False
    before, after = (
        [other.strip() for other in part if not other.strip().startswith(("//", ".loc"))] for part in (lines[:number], lines[number + 1 :])
    )
    return line in (before[-1], after[0]) or (line.startswith("bar.sync") and guards_own_data(lines, number, source))


def guards_own_data(lines, number, source):
    """Whether a barrier stands between loads from shared memory and stores of the same threads to the same addresses.

    In tl.sum and tl.max a warp stores over what it has loaded itself. Addresses depend on the thread's number alone, so that the simulator sees all of them.
    """
    accesses = [(i, *access.groups()) for i, line in enumerate(lines) if (access := ACCESS.search(line))]
    loads = itertools.takewhile(lambda access: access[1] == "ld", reversed([access for access in accesses if access[0] < number]))
    stores = itertools.takewhile(lambda access: access[1] == "st", (access for access in accesses if access[0] > number))
    read, written = {address for _, _, address in loads}, {address for _, _, address in stores}
    return bool(read and written) and ("core.reduce(" in source or read == written)


def sites(ptx):
    """(number of the line, what stands there in the mutant, line of the kernel) of each fault that can be planted."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.M))
    source = ""
    for number, line in enumerate(ptx.splitlines()):
        if place := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            source = linecache.getline(files[place[1]], int(place[2])).strip()
        elif BARRIER.search(line):
            yield number, "", source
        elif match := COMPARISON.search(line):
            yield number, line.replace(match[0], f"setp.{OTHER[match[1]]}{match[2]}.", 1), source


def channel_loss_case(monkeypatch):
    def step(x, *arguments):
        loss, mean_q, var_q = torch.ops.normtweak.channel_loss(x, *(a.to(x.dtype) if a.is_floating_point() else a for a in arguments), False)
        statistics = (mean_q, var_q, arguments[0].to(x.dtype), arguments[1].to(x.dtype))
        return loss, torch.ops.normtweak.channel_loss_backward(torch.ones((), dtype=x.dtype), x, *statistics, arguments[2], False)

    module = importlib.import_module("normtweak_kernels.channel_loss.triton_kernel")
    # Small tiles, so that a few numbers of tokens end at each of the rows that a thread holds. Two strips of two tiles, the last of which is missing.
    small = dataclasses.replace(module.LAUNCH, block_tokens=16, grad_tokens=16, max_strips=2, merge_strips=4)
    monkeypatch.setattr(module, "LAUNCH", small)
    calls = []
    for tokens in range(33, 48, 2):
        x, mean_f, var_f = torch.randn(tokens, 40) * 2 + 5, torch.randn(40), torch.rand(40) + 0.5
        mask = torch.rand(tokens) < 0.7
        mask[-1] = True
        calls.append(((x, mean_f, var_f, mask), [step(t, mean_f, var_f, mask) for t in (x, x.double())]))
    # Where mean and variance are the float model's, the slope is 0.
    still = (torch.ones(()), x, mean_f, var_f, mean_f, var_f, mask, False)

    def run():
        for arguments, results in calls:
            for got, plain, exact in zip(step(*arguments), *results, strict=True):
                assert_accurate(got, plain, exact)
        assert (torch.ops.normtweak.channel_loss_backward(*still) == 0).all()

    outputs = {
        "channel_partials_fwd_kernel": {"counts_ptr", "roughs_ptr", "corrections_ptr", "m2s_ptr"},
        "channel_loss_fwd_kernel": {"mean_q_ptr", "var_q_ptr", "losses_ptr"},
        "channel_loss_bwd_kernel": {"grad_x_ptr"},
    }
    return run, outputs


def gptq_case(monkeypatch, *, clip_steps=0, static=False):
    n, k, group_size = 6, 24, 12
    x = torch.randn(2 * k, k, dtype=torch.float64)
    hinv = torch.linalg.cholesky(torch.linalg.inv(x.t() @ x), upper=True).float().contiguous()
    weight, index = torch.randn(n, k), (torch.arange(k) // group_size).int() if static else None
    # Ranges that the first columns and the last of the groups decide.
    weight[:3, ::group_size] *= 9
    weight[3:, group_size - 1 :: group_size] *= 9
    grids = torch.rand(2, n) * 0.2 + 0.1, torch.randint(0, 8, (2, n), dtype=torch.uint8)

    def solve(update, index):
        w, codes, scales, zeros = weight.clone(), torch.zeros(n, k, dtype=torch.uint8), grids[0].clone(), grids[1].clone()
        update(w, hinv, codes, scales, zeros, index, 0, k, 3, False, clip_steps)
        return w, codes, scales, zeros

    wanted = solve(update_reference.gptq_block_update, index)

    def run():
        got = solve(torch.ops.normtweak.gptq_block_update, index)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        if static:
            # Groups that aren't there aren't read.
            for wrong in (-1, 2):
                solve(torch.ops.normtweak.gptq_block_update, torch.where(index == 1, wrong, index).int())

    return run, {"gptq_block_update_fwd_kernel": {"codes_ptr", "errors_ptr"}}


def hessian_case(monkeypatch):
    # Small tiles, so that a few shapes end at each row and column that a thread holds.
    monkeypatch.setattr(launch, "_HESSIAN_NARROW", launch.HessianUpdateGpu(32, 16, 16, num_warps=4, num_stages=3))
    calls = []
    # Numbers of channels that 16 divides have a kernel of their own, which copies asynchronously; so would have numbers of tokens, and 1.
    tokens_up_to_two_tiles = [*range(2, 16), *range(17, 32)]
    shapes = [(tokens_up_to_two_tiles[7 * i % 29], 33 + i) for i in range(31) if i != 15] + [(tokens, 48) for tokens in (70, 5, 17, 23, 31)]
    for tokens, k in shapes:
        x, start = (torch.randn(tokens, k) + 0.5).bfloat16(), torch.randn(k, k)
        plain, exact = start.clone(), start.double()
        hessian_reference.hessian_update(plain, x)
        hessian_reference.hessian_update(exact, x.double())
        calls.append((x, start, plain, exact))

    def run():
        for x, start, plain, exact in calls:
            got = start.clone()
            hessian_update(got, x)
            assert_accurate(got.tril(), plain.tril(), exact.tril())

    return run, {"hessian_update_fwd_kernel": set()}


# The kernels of an op by what they are launched for. That an equally good candidate doesn't replace the best of the clip search isn't seen.
CASES = {
    "channel_loss": [channel_loss_case],
    "gptq_block_update": [gptq_case, lambda patch: gptq_case(patch, static=True), lambda patch: gptq_case(patch, clip_steps=2)],
    "hessian_update": [hessian_case],
}


def survives(run, outputs, ptx, number, text):
    """Whether nobody notices the fault in this one of the kernels that are launched."""
    lines = ptx.splitlines()
    lines[number] = text
    mutant = "\n".join(lines)
    try:
        with simulated(80, outputs, mutate=lambda _, compiled: mutant if compiled == ptx else compiled, profile=0):
            run()
    except (AssertionError, ValueError, IndexError):
        return False
    return True


def faults_of(run, outputs):
    """(what was planted, whether somebody noticed it; None where it changes nothing) of every fault in the kernels that `run` launches."""
    compiled: dict[str, str] = {}
    with simulated(80, outputs, mutate=lambda name, ptx: compiled.setdefault(ptx, name) and ptx, profile=0):
        run()
    for ptx, kernel in compiled.items():
        lines = ptx.splitlines()
        for number, text, source in sites(ptx):
            found = None if changes_nothing(lines, number, source) else not survives(run, outputs, ptx, number, text)
            yield f"{kernel}, line {number}: {lines[number].strip()}   from: {source}", found


@pytest.mark.ptx
@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_faults_are_found(op, monkeypatch, tmp_path):
    # PTX names its source files by the path that they had when it was compiled: what another checkout left in the cache names none that is here.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    faults = [fault for case in CASES[op] for fault in faults_of(*case(monkeypatch))]
    planted = [found for _, found in faults if found is not None]
    survivors = [what for what, found in faults if found is False]
    print(f"\n{op}: {sum(planted)} of {len(planted)} faults found, {len(faults) - len(planted)} more that change nothing", *survivors, sep="\n  ")
    assert len(planted) >= 10
    assert sum(planted) >= TARGET * len(planted), survivors


def test_what_is_planted():
    ptx = "\tbar.sync 0;\n\tsetp.lt.s32 %p1, %r1, %r2;\n\tsetp.eq.s32 %p1, %r1, %r2;\n\tsetp.gtu.f32 %p2, %f1, %f2;\n\tcp.async.wait_group 0x1;"
    assert [site[:2] for site in sites(ptx)] == [(0, ""), (1, "\tsetp.le.s32 %p1, %r1, %r2;"), (3, "\tsetp.geu.f32 %p2, %f1, %f2;"), (4, "")]
