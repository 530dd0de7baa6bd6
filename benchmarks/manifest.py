"""Writes kernels.json, what inspect_kernels.py compiles: every launch of kernels/normtweak_kernels/launch.py on every architecture.

    python benchmarks/manifest.py

A launch is compiled for some weights only (bits, groups, zeros, dtype), such that over a list of launches each kind meets each of the others; the
first of a list, which runs where nothing was tuned, for most of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from normtweak_kernels.dequant_gemm.triton_gemm import rows_per_load
from normtweak_kernels.dequant_gemm.triton_gemv import chunks_per_thread
from normtweak_kernels.launch import (
    CHANNEL_LOSS_GPU,
    DEQUANT_GEMM_GPU,
    GPTQ_BLOCK_UPDATE_GPU,
    DequantGemmGpu,
    DequantGemvGpu,
    hessian_update_gpu,
    nearest_architecture,
)

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
FILE = Path(__file__).with_name("kernels.json")
PACKAGE = "normtweak_kernels"
Entry = dict[str, Any]
# Bits, group size (0: per channel), zeros, dtype.
WEIGHTS = [
    (4, 64, True, "bf16"), (2, 64, True, "fp16"), (3, 64, True, "bf16"), (4, 0, False, "fp16"), (8, 128, False, "bf16"), (3, 0, False, "fp16"),
    (4, 32, True, "fp16"), (2, 0, False, "bf16"), (4, 128, False, "bf16"), (8, 0, True, "fp16"), (3, 128, False, "fp16"), (2, 32, True, "bf16"),
]  # fmt: skip


def entry(name: str, kernel: str, targets: list[str], arguments: Entry, opt: Entry, problem: Entry, **require: object) -> Entry:
    """arguments: types ("*fp16") and values (numbers, None) by name."""
    types = {key: value for key, value in arguments.items() if isinstance(value, str) and value not in ("ieee", "bf16x6")}
    return {
        "name": name,
        "kernel": f"{PACKAGE}.{kernel}",
        "targets": targets,
        "sig": {key: f"{value}:16" if value.startswith("*") else value for key, value in types.items()},
        "const": {key: value for key, value in arguments.items() if key not in types},
        "opt": opt,
        "require": {"max_local": 0, "min_warps": 8, **require},
        "problem": problem,
    }


def gemv(target: str, config: DequantGemvGpu, weight: tuple[int, int, bool, str], m: int) -> Entry:
    bits, group_size, zeros, dtype = weight
    lanes = 16 if target.startswith("gfx") else 8
    arguments = {
        "x_ptr": f"*{dtype}", "qweight_ptr": "*i32", "scales_ptr": "*fp16", "zeros_ptr": "*u8" if zeros else None, "bias_ptr": f"*{dtype}",
        "y_ptr": f"*{dtype}", "M": 1 if m == 1 else "i32", "N": "i32:16", "K": "i32:16", "GROUP_CHUNKS": group_size // 32, "TAIL": False, "BITS": bits,
        "BLOCK_M": m, "THREAD_ROWS": lanes * config.num_warps, "CHUNKS": chunks_per_thread(config.chunks, group_size // 32 or config.chunks, bits, m), "CENTRE": False,
    }  # fmt: skip
    problem = {"vars": {"M": m, "N": 4096, "K": 4096}, "flops": "2*M*N*K", "bytes": f"N*K*{bits}//8 + 2*M*(N+K)", "grid": "cdiv(N,16)"}
    return entry("dequant_gemv", "dequant_gemm.triton_gemv:dequant_gemv_fwd_kernel", [target], arguments, {"num_warps": config.num_warps}, problem)


def gemm(target: str, config: DequantGemmGpu, weight: tuple[int, int, bool, str], regime: str) -> Entry:
    bits, group_size, zeros, dtype = weight
    backward = regime == "backward"
    arguments = {
        "grad_ptr" if backward else "x_ptr": "*i8" if regime == "int8" else f"*{dtype}", "qweight_ptr": "*i32", "scales_ptr": "*i64",
        "zeros_ptr": "*i64" if zeros else None, "M": "i32", "N": "i32:16", "K": "i32:16", "BITS": bits, "SCALE_BITS": 16, "GROUP_SIZE": group_size,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "GROUP_M": config.group_m,
    }  # fmt: skip
    if backward:
        arguments |= {"grad_x_ptr": f"*{dtype}", "BLOCK_K": config.block_k, "EVEN_N": True}
    else:
        arguments |= {"BLOCK_K": max(64, min(config.block_k, 2 * (group_size or config.block_k))), "SPLIT_K": config.split_k, "EVEN_K": True}
        arguments |= {"y_ptr": "*fp32" if config.split_k > 1 else f"*{dtype}", "bias_ptr": None, "x_scale_ptr": "*fp32" if regime == "int8" else None}
        arguments["x_sums_ptr"] = "*i32" if regime == "int8" and bits == 8 and zeros else None
    tile = (config.block_n // 2, arguments["BLOCK_K"]) if backward else (config.block_n, arguments["BLOCK_K"] // 2)
    arguments |= rows_per_load(bits, *tile, config.num_warps, by_twos=not target.startswith("gfx"))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    m = {"few rows": config.block_m}.get(regime, 4096)
    grid = "cdiv(M,BLOCK_M)*cdiv(K,BLOCK_K)" if backward else "cdiv(M,BLOCK_M)*cdiv(N,BLOCK_N)*SPLIT_K"
    problem = {"vars": {"M": m, "N": 4096, "K": 4096}, "flops": "2*M*N*K", "bytes": "2*M*K + 2*M*N + N*K*BITS//8", "grid": grid}
    kernel = "dequant_gemm.triton_gemm:dequant_gemm_" + ("bwd_kernel" if backward else "fwd_kernel")
    return entry(f"dequant_gemm {regime}", kernel, [target], arguments, options, problem, tensor=True)


def products(target: str) -> Iterator[Entry]:
    lists = DEQUANT_GEMM_GPU[target]
    for i, config in enumerate(lists.gemv):
        for weight in WEIGHTS[:4] if i == 0 else WEIGHTS[i : i + 1]:
            yield gemv(target, config, weight, 1)
    if lists.gemv_max_rows > 1:
        yield from (gemv(target, lists.gemv[0], weight, lists.gemv_max_rows) for weight in WEIGHTS[:3])
    firsts = [
        (regime, [config], [weight for weight in WEIGHTS if first.get((weight[0], weight[1] > 0)) == config], 9)
        for regime, first in (("many rows", lists.many_rows_first), ("backward", lists.backward_first))
        for config in dict.fromkeys(first.values())
    ]
    # W8A8 and W4A8; per channel, and in groups.
    bytes_ = [(8, 0, False, "fp16"), (4, 128, True, "bf16"), (4, 0, False, "fp16"), (8, 128, True, "bf16")]
    for regime, configs, weights, first in (
        ("few rows", lists.few_rows, WEIGHTS, 4),
        *firsts,
        ("many rows", lists.many_rows, WEIGHTS, 8),
        ("int8", lists.int8, bytes_, 4),
        ("backward", lists.backward, WEIGHTS, 6),
    ):
        for i, config in enumerate(configs):
            for weight in islice(weights[i:] + weights, min(first if i == 0 else 2, len(weights))):
                yield gemm(target, config, weight, regime)


def channel_loss(targets: list[str]) -> Iterator[Entry]:
    config, module = CHANNEL_LOSS_GPU, "channel_loss.triton_kernel:"
    partials = {"counts_ptr": "*i32", "roughs_ptr": "*fp32", "corrections_ptr": "*fp32", "m2s_ptr": "*fp32"}
    sizes = {"tokens": "i32:16", "channels": "i32:16"}
    merge = {
        **partials,
        "counts_ptr": "*i64",
        "strips": "i32",
        "channels": "i32:16",
        "BLOCK_S": config.merge_strips,
        "BLOCK_C": config.merge_channels,
    }
    variables = {"T": 16384, "C": 4096}
    for dtype, size, masked in (("bf16", 2, False), ("fp32", 4, False), ("bf16", 2, True)):
        suffix, mask = f" {dtype}" + ", mask" * masked, "*i64" if masked else None
        forward = {
            "x_ptr": f"*{dtype}",
            "mask_ptr": mask,
            **partials,
            **sizes,
            "tiles": "i32",
            "BLOCK_T": config.block_tokens,
            "BLOCK_C": config.block_channels,
        }
        options = {"num_warps": config.num_warps, "enable_fp_fusion": True}
        problem = {"vars": variables, "bytes": f"{size}*T*C", "grid": f"{config.max_strips}*cdiv(C,BLOCK_C)"}
        yield entry("channel_loss forward" + suffix, module + "channel_partials_fwd_kernel", targets, forward, options, problem)
        channels = dict.fromkeys(("mean_q_ptr", "var_q_ptr", "mean_f_ptr", "var_f_ptr"), "*fp32")
        backward = {"grad_ptr": "*fp32", "x_ptr": f"*{dtype}", "mask_ptr": mask, "kept_ptr": "*i64" if masked else None, **channels}
        backward |= {"grad_x_ptr": f"*{dtype}", **sizes, "SQUARED": False, "BLOCK_T": config.grad_tokens, "BLOCK_C": config.grad_channels}
        problem = {"vars": variables, "bytes": f"{2 * size}*T*C", "grid": "cdiv(T,BLOCK_T)*cdiv(C,BLOCK_C)"}
        for target in targets:
            options = {"num_warps": config.grad_wavefronts if target.startswith("gfx") else config.grad_warps, "enable_fp_fusion": True}
            yield entry("channel_loss backward" + suffix, module + "channel_loss_bwd_kernel", [target], backward, options, problem)
    options = {"num_warps": config.merge_warps, "enable_fp_fusion": True}
    problem = {"vars": variables, "bytes": f"12*{config.max_strips}*C", "grid": "cdiv(C,BLOCK_C)"}
    loss = {"mean_f_ptr": "*fp32", "var_f_ptr": "*fp32", "mean_q_ptr": "*fp32", "var_q_ptr": "*fp32", "losses_ptr": "*fp32", "SQUARED": False}
    yield entry("channel_loss merge", module + "channel_loss_fwd_kernel", targets, merge | loss, options, problem)
    statistics = {"mean_ptr": "*fp32", "m2_ptr": "*fp32"}
    yield entry("channel_statistics merge", module + "channel_statistics_fwd_kernel", targets, merge | statistics, options, problem)


def gptq_block_update(targets: list[str]) -> Iterator[Entry]:
    pointers = {"weight_ptr": "*fp32", "hinv_ptr": "*fp32", "codes_ptr": "*u8", "scales_ptr": "*fp32", "zeros_ptr": "*u8", "errors_ptr": "*fp32"}
    sizes = {"n": "i32:16", "k": "i32:16", "groups": "i32", "group_size": "i32:16", "start": "i32:16", "width": "i32:16"}
    problem = {"vars": {"N": 4096}, "flops": "2*N*128*64", "bytes": "N*128*13 + 128*128*4", "grid": "cdiv(N,BLOCK_N)"}
    for name, index, factors, bits, find, steps in (
        ("static groups", "*i32", None, 4, False, 0),
        ("grids found", None, None, 4, True, 0),
        ("clip search", None, "*fp32", 2, True, 24),
    ):
        arguments = {
            **pointers,
            **sizes,
            "index_ptr": index,
            "factors_ptr": factors,
            "BITS": bits,
            "SYMMETRIC": not steps,
            "FIND": find,
            "FIRSTS": 4,
            "CLIP_STEPS": steps,
        }
        kernel = "gptq_block_update.triton_kernel:gptq_block_update_fwd_kernel"
        for target in targets:
            config = GPTQ_BLOCK_UPDATE_GPU[nearest_architecture(target, GPTQ_BLOCK_UPDATE_GPU)]
            tile = {"BLOCK_N": config.block_rows, "BLOCK_K": config.max_columns}
            options = {"num_warps": config.num_warps, "enable_fp_fusion": False}
            yield entry(f"gptq_block_update, {name}", kernel, [target], arguments | tile, options, problem)


def hessian_update(targets: list[str]) -> Iterator[Entry]:
    for k in (4096, 576):
        config = hessian_update_gpu(k)
        for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
            block_t, precision = (config.block_tokens_float32, "bf16x6") if dtype == "fp32" else (config.block_tokens, "ieee")
            arguments = {"hessian_ptr": "*fp32", "x_ptr": f"*{dtype}", "tokens": "i32:16", "k": "i32:16", "PRECISION": precision}
            arguments |= {"BLOCK_K": config.block_channels, "BLOCK_T": block_t}
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
            problem = {"vars": {"T": 2048, "K": k}, "flops": f"T*K*K*{6 if dtype == 'fp32' else 1}", "bytes": f"{size}*T*K + 4*K*K"}
            problem["grid"] = "cdiv(K,BLOCK_K)*(cdiv(K,BLOCK_K)+1)//2"
            kernel = "hessian_update.triton_kernel:hessian_update_fwd_kernel"
            yield entry(f"hessian_update K={k} {dtype}", kernel, targets, arguments, options, problem, tensor=True)


def entries() -> list[Entry]:
    """All of them; the same kernel, types and launch on several architectures once."""
    every = [*channel_loss(list(TARGETS)), *gptq_block_update(list(TARGETS)), *hessian_update(list(TARGETS))]
    every += [product for target in TARGETS for product in products(target)]
    merged: dict[str, Entry] = {}
    for one in every:
        key = json.dumps({name: value for name, value in one.items() if name != "targets"})
        merged.setdefault(key, one | {"targets": []})["targets"] += one["targets"]
    return list(merged.values())


def text() -> str:
    """The manifest, an entry a line."""
    return '{"targets": ' + json.dumps(TARGETS) + ',\n "kernels": [\n  ' + ",\n  ".join(map(json.dumps, entries())) + "\n ]}\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf8")
