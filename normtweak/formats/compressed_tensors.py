"""compressed-tensors' format "pack-quantized", as llm-compressor writes it and vLLM and transformers read it.

Of each linear [N, K] with G groups: weight_packed int32 [N, ceil(K*bits/32)], codes along K; weight_scale [N, G]; weight_shape int64 [2], N and K; asymmetric ones have
weight_zero_point int32 [ceil(N*bits/32), G], packed along N. Old ones may have weight_g_idx int32 [K], each input's group. Words are GPTQ's, transposed. What differs by module is
in `config_groups`, each with its `targets`: paths, `re:` regular expressions that match from a path's beginning, or classes, the more exact before the less; `ignore` comes first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normtweak_kernels import packing, repack_gptq, repack_to_gptq

from ..config import require
from ..linear import PackedLinear
from .gptq import permutation, stored_scales
from .scheme import Scheme, commonest, packed_scheme, patterns

_METHOD = "compressed-tensors"


class CompressedTensors:
    """See `formats.Format`."""

    leaves: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    codes = "weight_packed"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        groups: Mapping[str, Any] = settings.get("config_groups") or {}
        require(bool(groups), "load", "config_groups", "given", "none")
        for argument in ("kv_cache_scheme", "transform_config", "sparsity_config"):
            value = settings.get(argument)
            absent = not value or (argument == "sparsity_config" and value.get("format") == "dense")
            require(absent, "load", argument, "absent", "one")
        self._groups: list[tuple[list[str], Scheme]] = []
        for name, group in groups.items():
            form = group.get("format") or settings.get("format")
            require(form == "pack-quantized", "load", f"{name}.format", "pack-quantized", form)
            for argument in ("input_activations", "output_activations"):
                require(not group.get(argument), "load", f"{name}.{argument}", "absent (activations that aren't quantized)", "one")
            self._groups.append((list(group["targets"]), _scheme(name, group["weights"])))

    def scheme(self, path: str) -> Scheme | None:
        """See `formats.Format`."""
        if any(_matches(target, path) for target in self.settings.get("ignore") or ()):
            return None
        found = [(rank, scheme) for targets, scheme in self._groups for target in targets if (rank := _matches(target, path))]
        return min(found, key=lambda pair: pair[0])[1] if found else None

    def tensors(self, scheme: Scheme, n: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See `formats.Format`. (weight_g_idx isn't among them: who reads one asks for it.)"""
        groups = scheme.groups(k)
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight_packed": (torch.int32, (n, -(-k * scheme.bits // 32))),
            "weight_scale": (torch.float16, (n, groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        if not scheme.symmetric:
            tensors["weight_zero_point"] = (torch.int32, (-(-n * scheme.bits // 32), groups))
        return tensors

    def read(self, path: str, tensors: Mapping[str, Tensor], n: int, k: int) -> PackedLinear:
        """See `formats.Format`."""
        scales, zeros, perm = self.grid(path, tensors, n, k)
        bits, words = packed_scheme(path, self.scheme(path)).bits, tensors["weight_packed"]
        # Before version 0.10 three bits were packed ten to a word.
        shape = (n, -(-k * bits // 32))
        good = tuple(words.shape) == shape and words.dtype == torch.int32
        require(good, path, "weight_packed", f"int32 {shape} (codes without gaps)", f"{words.dtype} {tuple(words.shape)}")
        if perm is None:
            packed = repack_gptq(words.t().contiguous(), bits, k)
        else:
            packed = packing.pack(packing.unpack_gptq(words.t(), bits, k)[:, perm], bits)
        return PackedLinear(packed, scales, zeros, tensors.get("bias"), bits=bits, in_features=k, perm=perm)

    def grid(self, path: str, tensors: Mapping[str, Tensor], n: int, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `formats.Format`."""
        scheme = packed_scheme(path, self.scheme(path))
        wanted = {"weight_scale"} | (set() if scheme.symmetric else {"weight_zero_point"})
        missing = wanted - set(tensors)
        require(not missing, "load", path, "packed with " + " and ".join(sorted(wanted)), f"no {', '.join(sorted(missing))}")
        if (shape := tensors.get("weight_shape")) is not None:
            require(shape.tolist() == [n, k], path, "weight_shape", f"[{n}, {k}]", shape.tolist())
        scales = stored_scales(path, tensors["weight_scale"]).t().contiguous()
        require(tuple(scales.shape) == (scheme.groups(k), n), path, "weight_scale", f"[{n}, {scheme.groups(k)}]", tuple(scales.t().shape))
        zeros = None
        if not scheme.symmetric:
            try:
                zeros = packing.unpack_gptq_zeros(tensors["weight_zero_point"].t(), scheme.bits, n, v2=True)
            except ValueError as error:
                raise ValueError(f"{path}: weight_zero_point, transposed: {error}") from error
            require(zeros.shape == scales.shape, path, "weight_zero_point", f"of {len(scales)} columns", len(zeros))
        return scales, zeros, permutation(path, tensors.get("weight_g_idx"), scheme, k)

    def check(self, path: str, scales: Tensor, zeros: Tensor | None, perm: Tensor | None) -> None:
        """See `formats.Format`. Groups of scattered inputs are held no more: today's loaders know no weight_g_idx."""
        require(perm is None, "formats", path, f"of groups that lie side by side for format {_METHOD}", "act-order groups (g_idx)")

    def write(self, path: str, linear: PackedLinear) -> dict[str, Tensor]:
        """See `formats.Format`."""
        self.check(path, linear.scales, linear.zeros, linear.perm)
        n, k, bits = linear.out_features, linear.in_features, linear.bits
        tensors = {
            "weight_packed": repack_to_gptq(linear.qweight, bits, n, k).t().contiguous(),
            "weight_scale": linear.scales.t().contiguous(),
            "weight_shape": torch.tensor([n, k]),
        }
        if not packed_scheme(path, self.scheme(path)).symmetric:
            zeros = torch.full_like(linear.scales, 2 ** (bits - 1), dtype=torch.uint8) if linear.zeros is None else linear.zeros
            tensors["weight_zero_point"] = packing.pack_gptq_zeros(zeros, bits, v2=True).t().contiguous()
        return tensors if linear.bias is None else tensors | {"bias": linear.bias.data}


def _matches(target: str, path: str) -> int:
    """0 for a target that isn't the linear's; the lower above that, the more exact."""
    if target == path:
        return 1
    if target.startswith("re:"):
        try:
            return 2 if re.match(target.removeprefix("re:"), path) else 0
        except re.error as error:
            raise ValueError(f"load: targets must be regular expressions behind re:, got {target!r} ({error})") from None
    return 3 if target == "Linear" else 0


def _scheme(name: str, weights: Mapping[str, Any] | None) -> Scheme:
    require(bool(weights), "load", f"{name}.weights", "given", weights)
    assert weights is not None
    kind, strategy, size = weights.get("type", "int"), weights.get("strategy"), weights.get("group_size")
    require(kind == "int", "load", f"{name}.weights.type", "int", kind)
    strategy = strategy or ("channel" if size in (None, -1) else "group")
    require(strategy in ("channel", "group"), "load", f"{name}.weights.strategy", "channel or group", strategy)
    require(strategy == "channel" or size is not None, "load", f"{name}.weights.group_size", "given", size)
    return Scheme(weights.get("num_bits", 8), weights["group_size"] if strategy == "group" else -1, bool(weights.get("symmetric", True)))


def describe(schemes: Mapping[str, Scheme], plain: Sequence[str]) -> dict[str, Any]:
    """See `formats.describe`. One scheme is given to the class Linear, several to the linears by path."""
    kinds, groups = commonest(schemes), {}
    for number, scheme in enumerate(kinds):
        chosen = [path for path, other in schemes.items() if other == scheme]
        rest = [path for path in schemes if path not in set(chosen)] + list(plain)
        weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
        weights |= {"strategy": "channel", "group_size": None} if scheme.group_size == -1 else {"strategy": "group", "group_size": scheme.group_size}
        targets = ["Linear"] if len(kinds) == 1 else [f"re:{pattern}" for pattern in patterns(chosen, rest)]
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": _METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(plain),
    }
