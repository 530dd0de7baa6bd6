"""How far a quantized model's activations are from the float model's, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normtweak_kernels import ChannelStatistics

from ..activations import computing
from ..models import block_path
from ..progress import Progress


@torch.inference_mode()
def channel_statistics(model: Any, windows: Tensor, dtype: torch.dtype, progress: Progress) -> list[ChannelStatistics]:
    """Mean and variance of each channel of each block's output over the tokens of windows [count, length], the first of each left out (models keep a massive
    activation there)."""
    blocks = model.get_submodule(block_path(model))
    found = [ChannelStatistics() for _ in blocks]

    def look(statistics: ChannelStatistics) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            statistics.update(hidden[:, 1:].float(), torch.ones(hidden.shape[0], hidden.shape[1] - 1, dtype=torch.bool, device=hidden.device))

        return hook

    hooks = [block.register_forward_hook(look(statistics)) for block, statistics in zip(blocks, found, strict=True)]
    try:
        with progress.task("measuring activations", len(windows)) as advance:
            for window in windows.split(1):
                with computing(model.device.type, dtype):
                    model(input_ids=window.to(model.device), use_cache=False, logits_to_keep=1)
                advance()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def drift(ours: list[ChannelStatistics], theirs: list[ChannelStatistics]) -> dict[str, float]:
    """Each block's mean over channels of |difference of means| and of |difference of variances|: the two terms of the paper's eq. 2."""
    values = {}
    for index, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        values[f"block {index} mean"] = (own.mean - other.mean).abs().mean().item()
        values[f"block {index} variance"] = (own.var - other.var).abs().mean().item()
    return values
