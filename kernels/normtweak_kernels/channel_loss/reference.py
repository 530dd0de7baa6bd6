"""channel_loss in plain torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry


def kept_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens that count, [T, C], in float32 or wider."""
    tokens = x.flatten(0, -2) if mask is None else x[mask]
    return tokens if x.dtype == torch.float64 else tokens.float()


@registry.register("channel_statistics", "reference")
def channel_statistics(x: Tensor, mask: Tensor | None) -> tuple[int, Tensor, Tensor]:
    """Number of tokens kept; each channel's mean and sum of squared deviations from it, float64. Zeros when no token is kept."""
    tokens = kept_tokens(x, mask)
    if len(tokens) == 0:
        zeros = tokens.new_zeros(x.shape[-1], dtype=torch.float64)
        return 0, zeros, zeros
    mean = tokens.mean(0)
    return len(tokens), mean.double(), (tokens - mean).square().sum(0).double()


@registry.register("channel_loss", "reference")
def channel_loss(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, mean_q, var_q. Two passes: the variance around the mean, not a difference of sums. NaN when no token is kept."""
    tokens = kept_tokens(x, mask)
    mean_q = tokens.mean(0)
    var_q = (tokens - mean_q).square().mean(0)
    d_mean, d_var = mean_q - mean_f, var_q - var_f
    loss = (d_mean.square() + d_var.square()).mean() if squared else (d_mean.abs() + d_var.abs()).mean()
    return loss, mean_q, var_q


@registry.register("channel_loss_backward", "reference")
def channel_loss_backward(
    grad: Tensor, x: Tensor, mean_q: Tensor, var_q: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool
) -> Tensor:
    """dL/dx, in x's shape and dtype."""
    d_mean, d_var = mean_q - mean_f, var_q - var_f
    slope_mean, slope_var = (2 * d_mean, 2 * d_var) if squared else (d_mean.sign(), d_var.sign())
    tokens = x.numel() // x.shape[-1] if mask is None else mask.sum()
    scale = grad / (x.shape[-1] * tokens)
    grad_x = scale * (slope_mean + 2 * slope_var * (x.to(mean_q.dtype) - mean_q))
    if mask is not None:
        grad_x = grad_x * mask.unsqueeze(-1)
    return grad_x.to(x.dtype).contiguous()


@registry.register("channel_loss_and_grad", "reference")
def channel_loss_and_grad(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool, out: Tensor) -> Tensor:
    """The loss; dL/dx goes to out."""
    loss, mean_q, var_q = channel_loss(x, mean_f, var_f, mask, squared)
    out.copy_(channel_loss_backward(torch.ones_like(loss), x, mean_q, var_q, mean_f, var_f, mask, squared))
    return loss
