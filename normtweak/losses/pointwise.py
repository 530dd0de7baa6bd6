"""Losses token by token: the paper's ablation (MSE, KL) and the per-token-normalized MSE of the default preset."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def mse(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference over kept tokens and channels."""
    return (output.float() - target.float())[mask].square().mean()


def token_mse(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over kept tokens of |output - target|^2 / |target|^2: no token outweighs another by its norm."""
    output, target = output.float()[mask], target.float()[mask]
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)).mean()


def kl(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(output)) over channels, mean over kept tokens."""
    output, target = output.float()[mask].log_softmax(-1), target.float()[mask].log_softmax(-1)
    return functional.kl_div(output, target, log_target=True, reduction="batchmean")


LOSSES = {"mse": mse, "token_mse": token_mse, "kl": kl}
