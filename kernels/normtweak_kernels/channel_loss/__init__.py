"""channel_loss: the distance of each channel's mean and variance from the float model's (Norm Tweaking, arXiv 2309.02784, eq. 2).

    L = 1/C sum_c ( |mean_f[c] - mean_q[c]| + |var_f[c] - var_q[c]| )
with mean and (biased) variance over all tokens that the mask keeps. The squared form replaces |d| by d**2. Backward, with T tokens kept:
    dL/dx[t, c] = 1/(C T) ( g(mean_q - mean_f) + 2 g(var_q - var_f) (x[t, c] - mean_q) ),   g = sign, or d -> 2 d (squared)
and 0 for masked tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry
from . import cpp_kernel, reference  # noqa: F401  (they register their bodies)
from .statistics import ChannelStatistics

__all__ = ["ChannelStatistics", "channel_loss"]

torch.library.define("normtweak::channel_loss", "(Tensor x, Tensor mean_f, Tensor var_f, Tensor? mask, bool squared) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "normtweak::channel_loss_backward",
    "(Tensor grad, Tensor x, Tensor mean_q, Tensor var_q, Tensor mean_f, Tensor var_f, Tensor? mask, bool squared) -> Tensor",
)


@torch.library.impl("normtweak::channel_loss", "default")
def _run(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool) -> tuple[Tensor, Tensor, Tensor]:
    args = (x, mean_f, var_f, mask, squared)
    return registry.select("channel_loss", *args).run(*args)


@torch.library.impl("normtweak::channel_loss_backward", "default")
def _run_backward(
    grad: Tensor, x: Tensor, mean_q: Tensor, var_q: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool
) -> Tensor:
    args = (grad, x, mean_q, var_q, mean_f, var_f, mask, squared)
    return registry.select("channel_loss_backward", *args).run(*args)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("normtweak::channel_loss")
def _fake(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype, channels = _statistics_dtype(x), x.shape[-1]
    return x.new_empty((), dtype=dtype), x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)


@torch.library.register_fake("normtweak::channel_loss_backward")
def _fake_backward(
    grad: Tensor, x: Tensor, mean_q: Tensor, var_q: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    x, mean_f, var_f, mask, ctx.squared = inputs
    _, mean_q, var_q = output
    ctx.save_for_backward(x, mean_q, var_q, mean_f, var_f, mask)
    ctx.mark_non_differentiable(mean_q, var_q)


def _backward(ctx, grad, _grad_mean, _grad_var):
    x, mean_q, var_q, mean_f, var_f, mask = ctx.saved_tensors
    grad_x = torch.ops.normtweak.channel_loss_backward(grad, x, mean_q, var_q, mean_f, var_f, mask, ctx.squared)
    return grad_x, None, None, None, None


torch.library.register_autograd("normtweak::channel_loss", _backward, setup_context=_setup_context)


def channel_loss(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None = None, *, form: str = "absolute") -> Tensor:
    """Eq. 2 of the paper between the channels of `x` and the float model's statistics; differentiable in x (once).

    x: [..., C], any float dtype; accumulated in float32 (float64 for float64). mean_f, var_f: [C], float32 or float64, constants (no gradient);
    `ChannelStatistics` collects them. mask: bool, x's shape without C; True keeps a token. form: "absolute" or "squared".
    Returns a scalar, float32 (float64 for float64). NaN when the mask keeps no token
    (whether it does is not looked at: on a GPU that would wait for the device). Raises ValueError for other shapes or forms.
    """
    if form not in ("absolute", "squared"):
        raise ValueError(f"channel_loss: form must be absolute or squared, got {form}")
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"channel_loss: x must be floating point [..., C], got {x.dtype} {tuple(x.shape)}")
    dtype = _statistics_dtype(x)
    for name, value in (("mean_f", mean_f), ("var_f", var_f)):
        if tuple(value.shape) != (x.shape[-1],):
            raise ValueError(f"channel_loss: {name} must be [{x.shape[-1]}], got {tuple(value.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
        raise ValueError(f"channel_loss: mask must be bool {tuple(x.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}")
    if x.numel() == 0:
        raise ValueError(f"channel_loss: x must hold at least one token, got {tuple(x.shape)}")
    return torch.ops.normtweak.channel_loss(x, mean_f.detach().to(dtype), var_f.detach().to(dtype), mask, form == "squared")[0]
