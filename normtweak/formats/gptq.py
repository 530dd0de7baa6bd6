"""GPTQ's format, versions 1 and 2, as GPTQModel, AutoGPTQ and others write it.

Of each linear [N, K] with G groups of scales: qweight int32 [ceil(K*bits/32), N], codes along K; qzeros int32 [G, ceil(N*bits/32)]; scales float16 [G, N]; g_idx int32
[K], each input's group. Version 1 stores zero - 1 (packing.py), version 2 the zero itself. What differs by module is in `dynamic`: regular expressions that match from a path's
beginning, the first match counts, `-:` in front for modules that aren't quantized.
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
from .scheme import Scheme, commonest, packed_scheme, patterns


class GPTQ:
    """See `formats.Format`."""

    leaves: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    codes = "qweight"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        form = settings.get("checkpoint_format", "gptq")
        require(form in ("gptq", "gptq_v2"), "load", "checkpoint_format", "gptq or gptq_v2", form)
        word = settings.get("pack_dtype", "int32")
        require(word == "int32", "load", "pack_dtype", "int32", word)
        self.settings, self.v2 = settings, form == "gptq_v2"
        rules = settings.get("dynamic") or {}
        tables = isinstance(rules, Mapping) and all(not own or isinstance(own, Mapping) for own in rules.values())
        require(tables, "load", "dynamic", "a table of patterns and their settings", rules)
        for pattern in rules:
            try:
                re.compile(_without_sign(pattern))
            except re.error as error:
                raise ValueError(f"load: dynamic must have regular expressions for keys, got {pattern!r} ({error})") from None

    def scheme(self, path: str) -> Scheme | None:
        """See `formats.Format`."""
        own: Mapping[str, Any] = {}
        for pattern, settings in (self.settings.get("dynamic") or {}).items():
            if re.match(_without_sign(pattern), path):
                if pattern.startswith("-:"):
                    return None
                own = settings or {}
                break
        if any(is_within(path, name) for name in self.settings.get("modules_to_not_convert") or ()):
            return None
        return scheme_of({**self.settings, **own})

    def tensors(self, scheme: Scheme, n: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See `formats.Format`."""
        groups = scheme.groups(k)
        return {
            "qweight": (torch.int32, (-(-k * scheme.bits // 32), n)),
            "qzeros": (torch.int32, (groups, -(-n * scheme.bits // 32))),
            "scales": (torch.float16, (groups, n)),
            "g_idx": (torch.int32, (k,)),
        }

    def read(self, path: str, tensors: Mapping[str, Tensor], n: int, k: int) -> PackedLinear:
        """See `formats.Format`."""
        scales, zeros, perm = self.grid(path, tensors, n, k)
        bits = packed_scheme(path, self.scheme(path)).bits
        qweight = tensors["qweight"]
        require(qweight.shape[1:] == (n,), path, "qweight", f"of {n} columns", tuple(qweight.shape))
        try:
            if perm is None:
                packed = repack_gptq(qweight, bits, k)
            else:
                packed = packing.pack(packing.unpack_gptq(qweight, bits, k)[:, perm], bits)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return PackedLinear(packed, scales, zeros, tensors.get("bias"), bits=bits, in_features=k, perm=perm)

    def grid(self, path: str, tensors: Mapping[str, Tensor], n: int, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `formats.Format`."""
        scheme = packed_scheme(path, self.scheme(path))
        missing = {"qzeros", "scales"} - set(tensors)
        require(not missing, "load", path, "packed with qweight, qzeros and scales", f"no {', '.join(sorted(missing))}")
        scales = stored_scales(path, tensors["scales"])
        require(tuple(scales.shape) == (scheme.groups(k), n), path, "scales", f"[{scheme.groups(k)}, {n}]", tuple(scales.shape))
        try:
            zeros = packing.unpack_gptq_zeros(tensors["qzeros"], scheme.bits, n, v2=self.v2)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        require(zeros.shape == scales.shape, path, "qzeros", f"of {len(scales)} rows, as scales", len(zeros))
        scattered = bool(self.settings.get("desc_act")) and len(scales) > 1
        require("g_idx" in tensors or not scattered, "load", path, "packed with g_idx, as desc_act is on", "none")
        perm = permutation(path, tensors.get("g_idx"), scheme, k)
        return scales, None if bool((zeros == 2 ** (scheme.bits - 1)).all()) else zeros, perm

    def check(self, path: str, scales: Tensor, zeros: Tensor | None, perm: Tensor | None) -> None:
        """See `formats.Format`. Version 1 holds no zero of 0: loaders differ in what they make of the -1 that it would be."""
        exact = scales.dtype == torch.float16
        require(exact, "formats", path, "of scales that float16 holds for GPTQ's format (compressed-tensors holds others)", scales.dtype)
        low = not self.v2 and zeros is not None and bool((zeros == 0).any())
        require(not low, "formats", path, "without a zero point of 0 for format gptq (version 1; gptq_v2 and compressed-tensors hold it)", "one")

    def write(self, path: str, linear: PackedLinear) -> dict[str, Tensor]:
        """See `formats.Format`."""
        self.check(path, linear.scales, linear.zeros, linear.perm)
        n, k, bits = linear.out_features, linear.in_features, linear.bits
        zeros = torch.full_like(linear.scales, 2 ** (bits - 1), dtype=torch.uint8) if linear.zeros is None else linear.zeros
        g_idx = torch.arange(k, dtype=torch.int32, device=linear.scales.device) // linear.group_size
        qweight = repack_to_gptq(linear.qweight, bits, n, k)
        if linear.perm is not None:
            codes = packing.unpack(linear.qweight, bits, n, k)
            qweight = packing.pack_gptq(torch.empty_like(codes).index_copy_(1, linear.perm.long(), codes), bits)
            g_idx = torch.empty_like(g_idx).index_copy_(0, linear.perm.long(), g_idx)
        tensors = {"qweight": qweight, "qzeros": packing.pack_gptq_zeros(zeros, bits, v2=self.v2), "scales": linear.scales, "g_idx": g_idx}
        return tensors if linear.bias is None else tensors | {"bias": linear.bias.data}


def _without_sign(pattern: str) -> str:
    return pattern.removeprefix("-:").removeprefix("+:")


def is_within(path: str, name: str) -> bool:
    """Whether a module is the one called `name` in a list, below it, or called so behind its parents."""
    return path == name or path.startswith(f"{name}.") or path.endswith(f".{name}")


def scheme_of(settings: Mapping[str, Any]) -> Scheme:
    """From `bits`, `group_size` and `sym`."""
    return Scheme(settings.get("bits", 0), settings.get("group_size", -1), bool(settings.get("sym", True)))


def stored_scales(path: str, scales: Tensor) -> Tensor:
    """Scales as packed linears hold them: float16, or float32 where that would round them."""
    require(
        scales.dim() == 2 and scales.is_floating_point(), path, "scales", "floating point of two dimensions", f"{scales.dtype} {tuple(scales.shape)}"
    )
    half = scales.half()
    return half if torch.equal(half.to(scales.dtype), scales) else scales.float()


def permutation(path: str, g_idx: Tensor | None, scheme: Scheme, k: int) -> Tensor | None:
    """The order of inputs int32 [k] that puts the groups of g_idx side by side, or None where they lie so. Raises ValueError for groups of unequal size."""
    size = k if scheme.group_size == -1 else scheme.group_size
    require(k % size == 0, path, "in_features", f"a multiple of the group size {size}, as groups must be of one size", k)
    if g_idx is None:
        return None
    plain = torch.arange(k, device=g_idx.device) // size
    if torch.equal(g_idx.long(), plain):
        return None
    perm = torch.argsort(g_idx.long(), stable=True)
    equal = tuple(g_idx.shape) == (k,) and torch.equal(g_idx.long()[perm], plain)
    require(equal, path, "g_idx", f"{k // size} groups of {size} inputs each", "groups of other sizes")
    return perm.to(torch.int32)


def describe(schemes: Mapping[str, Scheme], plain: Sequence[str], head: str | None, meta: Mapping[str, Any], *, v2: bool) -> dict[str, Any]:
    """See `formats.describe`. desc_act is what meta says, else false: g_idx is k // group_size."""
    usual, *others = commonest(schemes)
    form = "gptq_v2" if v2 else "gptq"
    meta = dict(meta)
    settings = {
        "quant_method": "gptq",
        "bits": usual.bits,
        "group_size": usual.group_size,
        "sym": usual.symmetric,
        "desc_act": meta.pop("desc_act", False),
    }
    settings |= {"lm_head": head in schemes, "checkpoint_format": form, "pack_dtype": "int32", "modules_to_not_convert": list(plain), "meta": meta}
    left = [path for path in plain if path != head]
    dynamic: dict[str, dict[str, Any]] = {f"-:{pattern}": {} for pattern in patterns(left, list(schemes))}
    for scheme in others:
        own = {"bits": scheme.bits, "group_size": scheme.group_size} | ({} if scheme.symmetric == usual.symmetric else {"sym": scheme.symmetric})
        chosen = [path for path, other in schemes.items() if other == scheme]
        rest = [path for path in schemes if path not in set(chosen)] + left
        dynamic |= {f"+:{pattern}": own for pattern in patterns(chosen, rest)}
    return settings | {"dynamic": dynamic} if dynamic else settings
