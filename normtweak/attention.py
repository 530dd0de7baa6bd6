"""Attention on a CPU in plain products, which take less time there than what models come with: for text that is written a token at a time, and for whole texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_DECODING, _BLOCKWISE = "normtweak_grouped", "normtweak_blockwise"
# Queries that are multiplied with the keys before them at a time: half as many are as fast on one thread, and too little work to share between two.
QUERIES = 128


@contextmanager
def decoding(model: Any) -> Iterator[None]:
    """`grouped_attention` in place of a model's own while open, on a CPU; plain products where the model's attention can't be exchanged.

    Measured on 2 cores, 32 sequences of up to 384 tokens, 9 heads that share 3 keys: two thirds of the time of transformers' eager attention, which copies
    keys and values for every head at every step, and 0.4 of that of the fused one, which is for many queries at a time. The text is eager attention's.
    """
    before = model.config._attn_implementation
    if model.device.type == "cpu":
        _register()
        model.set_attn_implementation(_DECODING if model._supports_attention_backend else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def use_blockwise(model: Any, device: torch.device) -> None:
    """`blockwise_attention` from now on in place of torch's fused one, where the model has that and lets it be exchanged, and is computed on a CPU; for calls without a cache.

    Measured on one core with bfloat16 products, 512 tokens, 9 heads of 64 that share 3 keys: half of the fused kernel's time forward, a third to a half of it backward. Rounded to
    bfloat16 the scores are eager attention's; the model's logits are as far from float32's as with the fused kernel.
    """
    if device.type == "cpu" and model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        _register()
        model.set_attn_implementation(_BLOCKWISE)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    AttentionInterface.register(_DECODING, grouped_attention)
    AttentionMaskInterface.register(_DECODING, eager_mask)
    AttentionInterface.register(_BLOCKWISE, blockwise_attention)
    AttentionMaskInterface.register(_BLOCKWISE, sdpa_mask)  # None where causal attention needs none


def blockwise_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling Q K^T + mask) V, some queries at a time, whose scores stay in cache; causal ones skip the keys behind them.

    Shapes as in `grouped_attention`. attention_mask: added to the scores, or bool, True where a query sees a key; None for causal attention where `is_causal` or else the
    module says so.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    batch, heads, length, width = query.shape
    groups, total = key.shape[1:3]
    shared = heads // groups
    causal = attention_mask is None and length > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    mask = _triangle(total, query) if causal else _added(attention_mask, query)
    # one matrix for each key head, whose heads are rows of it
    queries = query.reshape(batch, groups, shared, length, width)
    keys, values = (t.reshape(batch * groups, total, -1) for t in (key, value))
    outputs = []
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        seen, rows = stop if causal else total, stop - start
        added = mask[..., :rows, total - start : total - start + seen] if causal else mask[..., start:stop, :total]
        if position_bias is not None:
            added = added + position_bias[:, :, start:stop, :seen]
        if added.shape[:2] != (1, 1):
            added = added.expand(batch, heads, rows, seen).reshape(batch * groups, shared * rows, seen)
        else:
            added = added[0].repeat(1, shared, 1)
        own = queries[:, :, :, start:stop].reshape(batch * groups, shared * rows, width)
        scores = torch.baddbmm(added, own, keys[:, :seen].transpose(1, 2), alpha=width**-0.5 if scaling is None else scaling)
        outputs.append(torch.bmm(scores.softmax(-1), values[:, :seen]).view(batch, heads, rows, -1))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _triangle(total: int, like: Tensor) -> Tensor:
    """What is added to the scores of a block of queries that begins at position i, [1, 1, QUERIES, total + QUERIES]: from column total - i on for the keys."""
    behind = torch.arange(-total, QUERIES, device=like.device) > torch.arange(QUERIES, device=like.device)[:, None]
    return like.new_zeros(1, 1, *behind.shape).masked_fill_(behind, -torch.inf)


def _added(mask: Tensor | None, like: Tensor) -> Tensor:
    """A mask as numbers to add."""
    if mask is None:
        return like.new_zeros(1, 1, 1, 1).expand(1, 1, like.shape[2], 1)
    return like.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(like.dtype).min) if mask.dtype == torch.bool else mask.to(like.dtype)


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling Q K^T + mask) V, the heads that share a key as rows of one product.

    query: [B, H, L, D]. key: [B, G, T, D], value: [B, G, T, E], G a divisor of H. attention_mask: [B or 1, 1, L, T or more], added. softcap: c tanh(scores / c) of
    the scores comes first. s_aux: [H], a score a head beside the T whose share goes to nothing (attention sinks). position_bias: [B or 1, H, L, T], added.
    Returns [B, L, H, E].
    """
    batch, heads, length, width = query.shape
    groups, total = key.shape[1:3]
    shared = heads // groups
    scores = query.reshape(batch, groups, shared * length, width) @ key.transpose(2, 3)
    scores = scores.view(batch, heads, length, total) * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for added in (position_bias, attention_mask):
        if added is not None:
            scores = scores + added[..., :total]
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(batch, heads, length, 1)], -1)
    shares = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., :total]
    output = shares.reshape(batch, groups, shared * length, total) @ value
    return output.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None
