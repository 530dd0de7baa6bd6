"""Faults planted into the compiled PTX: the simulator or the comparison with float64 must find them.

A mutant lacks one barrier or one wait for an asynchronous copy, or one of its comparisons includes equality where it didn't, or the other way round.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from functools import partial

import pytest
import torch

from accuracy import assert_accurate, random_weight
from normtweak_kernels import hessian_update, launch
from normtweak_kernels.dequant_gemm.reference import quantize_activations
from normtweak_kernels.dequant_gemm.triton_gemm import gemm, gemm_int8, grad_x, quantize_tokens
from normtweak_kernels.dequant_gemm.triton_gemv import gemv
from normtweak_kernels.gptq_block_update import reference as update_reference
from normtweak_kernels.hessian_update import reference as hessian_reference
from normtweak_kernels.launch import DequantGemmGpu, DequantGemvGpu
from triton_faults import plant, sites

TARGET = 0.9

# Faults that change nothing, by the line of the kernel that they are in and what they hit. They count as that only if nobody finds them.
HARMLESS = [
    (re.compile(where), re.compile(what), why)
    for where, what, why in [
        (r"for \w+ in range\(0, \w+, BLOCK\w*\)", "setp", "a further pass has every element masked: it reads nothing and adds zeros"),
        (r"for \w+ in range\(", r"setp\.[lg][te]\.s32\s+\S+, \S+, [01];", "guards a loop that may have no pass; such calls launch nothing"),
        (r"for step in range\(", "setp", "fetches a step that isn't used, or multiplies one whose x is masked: beyond K nothing is read"),
    ]
]
# Comparisons whose operands are never equal, in any call that could be made. They count only if they weren't in those that were.
NEVER_EQUAL = [
    (re.compile(r"return tl\.load\(ptr \+ first, mask=first > K"), "K is at least 1, and first is 0"),
    (re.compile(r"tl\.load\(qweight_ptr, mask=K < 0"), "K is at least 1"),
    (re.compile(r"chosen = \(cols >= j\)"), "groups begin and end at a lane's first column, where they are compared"),
]
NEVER_EQUAL_IN_GROUPS = [
    (
        re.compile(r"mask_x & \(k \+ tl\.arange\(0, HALF\) < K\)"),
        "groups end where halves of a step do; were K to end at the first half, steps would divide it, which is another kernel",
    )
]


def channel_loss_case(monkeypatch):
    def step(x, *arguments):
        loss, mean_q, var_q = torch.ops.normtweak.channel_loss(x, *(a.to(x.dtype) if a.is_floating_point() else a for a in arguments), False)
        statistics = (mean_q, var_q, arguments[0].to(x.dtype), arguments[1].to(x.dtype))
        return loss, torch.ops.normtweak.channel_loss_backward(torch.ones((), dtype=x.dtype), x, *statistics, arguments[2], False)

    module = importlib.import_module("normtweak_kernels.channel_loss.triton_kernel")
    # Small tiles, so that a few numbers of tokens end at each of the rows that a thread holds. Two strips of two tiles, the last of which is missing.
    small = dataclasses.replace(module.LAUNCH, block_tokens=16, grad_tokens=16, max_strips=2, merge_strips=4)
    monkeypatch.setattr(module, "LAUNCH", small)

    def check(arguments, results):
        for got, plain, exact in zip(step(*arguments), *results, strict=True):
            assert_accurate(got, plain, exact)

    def check_still(*arguments):
        assert (torch.ops.normtweak.channel_loss_backward(*arguments) == 0).all()

    calls = []
    for tokens in range(33, 48, 2):
        x, mean_f, var_f = torch.randn(tokens, 40) * 2 + 5, torch.randn(40), torch.rand(40) + 0.5
        mask = torch.rand(tokens) < 0.7
        mask[-1] = True
        calls.append(partial(check, (x, mean_f, var_f, mask), [step(t, mean_f, var_f, mask) for t in (x, x.double())]))
    # Where mean and variance are the float model's, the slope is 0.
    calls.append(partial(check_still, torch.ones(()), x, mean_f, var_f, mean_f, var_f, mask, False))

    outputs = {
        "channel_partials_fwd_kernel": {"counts_ptr", "roughs_ptr", "corrections_ptr", "m2s_ptr"},
        "channel_loss_fwd_kernel": {"mean_q_ptr", "var_q_ptr", "losses_ptr"},
        "channel_loss_bwd_kernel": {"grad_x_ptr"},
    }
    return calls, outputs


def gptq_case(monkeypatch, *, clip_steps=0, static=False):
    # The last group lies behind the block: its columns get the errors.
    n, k, group_size, stop = 6, 36, 12, 24
    x = torch.randn(2 * k, k, dtype=torch.float64)
    hinv = torch.linalg.cholesky(torch.linalg.inv(x.t() @ x), upper=True).float().contiguous()
    weight, index = torch.randn(n, k), (torch.arange(k) // group_size).int() if static else None
    # Ranges that the first columns and the last of the groups decide.
    weight[:3, ::group_size] *= 9
    weight[3:, group_size - 1 :: group_size] *= 9
    grids = torch.rand(3, n) * 0.2 + 0.1, torch.randint(0, 8, (3, n), dtype=torch.uint8)

    def solve(update, index):
        w, codes, scales, zeros = weight.clone(), torch.zeros(n, k, dtype=torch.uint8), grids[0].clone(), grids[1].clone()
        update(w, hinv, codes, scales, zeros, index, 0, stop, 3, False, clip_steps)
        return w[:, stop:], w[:, :stop], codes[:, :stop], scales, zeros

    wanted = solve(update_reference.gptq_block_update, index)

    def check():
        got = solve(torch.ops.normtweak.gptq_block_update, index)
        assert torch.allclose(got[0], wanted[0], rtol=0, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(got[1:], wanted[1:], strict=True))

    # Groups that aren't there aren't read.
    wrong = [torch.where(index == 1, group, index).int() for group in (-1, 3)] if static else []
    return [check, *(partial(solve, torch.ops.normtweak.gptq_block_update, other) for other in wrong)], {
        "gptq_block_update_fwd_kernel": {"codes_ptr", "errors_ptr"}
    }


def hessian_case(monkeypatch):
    # Small tiles, so that a few shapes end at each row and column that a thread holds.
    monkeypatch.setattr(launch, "_HESSIAN_NARROW", launch.HessianUpdateGpu(32, 16, 16, num_warps=4, num_stages=3))

    def check(x, start, plain, exact):
        got = start.clone()
        hessian_update(got, x)
        assert_accurate(got.tril(), plain.tril(), exact.tril())

    calls = []
    # Numbers of channels that 16 divides have a kernel of their own, which copies asynchronously; so would have numbers of tokens, and 1.
    tokens_up_to_two_tiles = [*range(2, 16), *range(17, 32)]
    shapes = [(tokens_up_to_two_tiles[7 * i % 29], 33 + i) for i in range(31) if i != 15] + [(tokens, 48) for tokens in (70, 5, 17, 23, 31)]
    for tokens, k in shapes:
        x, start = (torch.randn(tokens, k) + 0.5).bfloat16(), torch.randn(k, k)
        plain, exact = start.clone(), start.double()
        hessian_reference.hessian_update(plain, x)
        hessian_reference.hessian_update(exact, x.double())
        calls.append(partial(check, x, start, plain, exact))
    return calls, {"hessian_update_fwd_kernel": set()}


def unaligned(parameters):
    """The same numbers at an odd address, where they aren't read as words of 64 bits whatever N is."""
    return None if parameters is None else torch.cat([parameters.new_zeros(1), parameters.flatten()])[1:].view(parameters.shape)


PRODUCT_OUTPUTS = {
    "dequant_gemv_fwd_kernel": {"y_ptr"},
    "dequant_gemm_fwd_kernel": {"y_ptr"},
    "dequant_gemm_sum_kernel": {"y_ptr"},
    "dequant_gemm_bwd_kernel": {"grad_x_ptr"},
    "quantize_tokens_kernel": {"x_int8_ptr", "scale_ptr"},
}


def product_case(patch, kind, bits, shapes, config, zeros=True):
    """One of dequant_gemm's kernels; its shapes (M, N, K, group size) end at each of the rows and columns that a thread holds."""

    def check(x, weight, bias):
        arguments = weight.pack(), unaligned(weight.scales), unaligned(weight.zeros)
        wide, dense = x.double(), weight.dequantize(torch.float64)
        if kind == "backward":
            return assert_accurate(grad_x(x, *arguments, bits, weight.codes.shape[1], config), x @ dense.half(), wide @ dense)
        if kind == "int8":
            wide = quantize_activations(x.float(), 1, "int8_token").double()
            y = gemm_int8(x, *arguments, bias, bits, config)
        else:
            y = gemv(x, *arguments, bias, bits, config, x.dtype) if kind == "few rows" else gemm(x, *arguments, bias, bits, config)
        return assert_accurate(y, torch.nn.functional.linear(wide.half(), dense.half(), bias), torch.nn.functional.linear(wide, dense, bias.double()))

    def check_bytes(x):
        x_int8, x_scale = quantize_tokens(x)
        assert ((x_int8.double() * x_scale[:, None].double() - x).abs() <= 0.51 * x_scale[:, None]).all()

    calls = [
        partial(
            check, torch.randn(m, n if kind == "backward" else k).half(), random_weight(n, k, bits, group_size, zeros=zeros), torch.randn(n).half()
        )
        for m, n, k, group_size in shapes
    ]
    if kind == "int8":
        # Rows that end within each of the eight values that a thread of that kernel holds, 256 apart.
        calls += [partial(check_bytes, torch.randn(2, 256 * i + 3).half()) for i in range(9)]
    return calls, PRODUCT_OUTPUTS, NEVER_EQUAL_IN_GROUPS if shapes[0][3] > 0 else []


# The kernels of an op by what they are launched for. That an equally good candidate doesn't replace the best of the clip search isn't seen.
# (M, N, K, group size) that end within each four rows of x of a tile of 16 x 32 (64 x 32: ENDS), and each four columns at every place of eight; none at a
# multiple of 16, which Triton compiles into another kernel. K is cut into two parts of one step or two, the last of them half a step.
FEW_ENDS = [(19, 33), (18, 47), (22, 40), (23, 38), (26, 50), (30, 52), (27, 59), (31, 61)]
ENDS = [(4 * i + 2 + i % 2, FEW_ENDS[i % 8][1]) for i in range(16)]
FEW_GROUPS, GROUPS = ([(m, n, 96 if i % 3 else 224, 32) for i, (m, n) in enumerate(ends)] for ends in (FEW_ENDS, ENDS))
BACKWARD = [(m, n - 32 * (i % 2), k, group_size) for i, (m, n, k, group_size) in enumerate(FEW_GROUPS)]
# K that ends at every place of eight, and in either half of the first step or the second.
CHANNELS = [(m, n, k, -1) for (m, n), k in zip(FEW_ENDS, (33, 70, 20, 79, 50, 85, 27, 120), strict=True)]
TILE = DequantGemmGpu(16, 32, 64, split_k=2, num_warps=4, num_stages=2)
WHOLE = dataclasses.replace(TILE, split_k=1)
CASES = {
    "channel_loss": [channel_loss_case],
    "gptq_block_update": [gptq_case, lambda patch: gptq_case(patch, static=True), lambda patch: gptq_case(patch, clip_steps=2)],
    "hessian_update": [hessian_case],
    "dequant_gemm, few rows": [
        partial(product_case, kind="few rows", bits=4, shapes=[(3, n, 192, 32) for _, n in FEW_ENDS], config=DequantGemvGpu(2, 1)),
        partial(
            product_case,
            kind="few rows",
            bits=3,
            shapes=[(3, n, k + more, -1) for more in (128, 144) for _, n, k, _ in CHANNELS],
            config=DequantGemvGpu(2, 1),
            zeros=False,
        ),
    ],
    "dequant_gemm, products scaled": [partial(product_case, kind="forward", bits=3, shapes=FEW_GROUPS, config=TILE)],
    "dequant_gemm, weights scaled": [
        partial(product_case, kind="forward", bits=4, shapes=GROUPS, config=dataclasses.replace(TILE, block_m=64)),
    ],
    "dequant_gemm, channels": [partial(product_case, kind="forward", bits=2, shapes=CHANNELS, config=WHOLE, zeros=False)],
    "dequant_gemm, backward": [partial(product_case, kind="backward", bits=4, shapes=BACKWARD, config=WHOLE)],
    "dequant_gemm, int8": [
        partial(product_case, kind="int8", bits=8, shapes=FEW_GROUPS, config=TILE),
        partial(product_case, kind="int8", bits=4, shapes=CHANNELS, config=WHOLE),
    ],
}


@pytest.mark.ptx
@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_faults_are_found(op, monkeypatch, tmp_path):
    # PTX names its source files by the path that they had when it was compiled: what another checkout left in the cache names none that is here.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    faults = []
    for case in CASES[op]:
        calls, outputs, *never_equal = case(monkeypatch)
        faults += plant(calls, outputs, HARMLESS, [reason for reasons in (NEVER_EQUAL, *never_equal) for reason in reasons])
    harmless = [fault for fault in faults if fault.reason]
    survivors = [fault.what for fault in faults if not fault.found and not fault.reason]
    planted = len(faults) - len(harmless)
    print(f"\n{op}: {planted - len(survivors)} of {planted} faults found, {len(harmless)} more that change nothing", *survivors, sep="\n  ")
    assert planted >= 10
    assert len(survivors) <= (1 - TARGET) * planted, survivors


def test_what_is_planted():
    ptx = "\tbar.sync 0;\n\tsetp.lt.s32 %p1, %r1, %r2;\n\tsetp.eq.s32 %p1, %r1, %r2;\n\tsetp.gtu.f32 %p2, %f1, %f2;\n\tcp.async.wait_group 0x1;"
    planted = [(site.number, site.mutated) for site in sites(ptx)]
    assert planted == [(0, ""), (1, "\tsetp.le.s32 %p1, %r1, %r2;"), (3, "\tsetp.geu.f32 %p2, %f1, %f2;"), (4, "")]
