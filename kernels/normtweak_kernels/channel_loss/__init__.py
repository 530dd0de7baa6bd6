"""channel_loss: the distance of each channel's mean and variance from the float model's (Norm Tweaking, arXiv 2309.02784, eq. 2).

    L = 1/C sum_c ( |mean_f[c] - mean_q[c]| + |var_f[c] - var_q[c]| )
with mean and (biased) variance over all tokens that the mask keeps. The squared form replaces |d| by d**2. Backward, with T tokens kept:
    dL/dx[t, c] = 1/(C T) ( g(mean_q - mean_f) + 2 g(var_q - var_f) (x[t, c] - mean_q) ),   g = sign, or d -> 2 d (squared)
and 0 for masked tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu, registry
from . import cpp_kernel, reference  # noqa: F401  (they register their bodies)
from .statistics import ChannelStatistics, check_tokens

__all__ = ["ChannelStatistics", "channel_loss", "channel_loss_and_grad"]

for _op in ("channel_statistics", "channel_loss", "channel_loss_backward", "channel_loss_and_grad"):
    registry.register_lazily(_op, "triton", f"{__name__}.triton_kernel", gpu.refuses)

torch.library.define("normtweak::channel_loss", "(Tensor x, Tensor mean_f, Tensor var_f, Tensor? mask, bool squared) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "normtweak::channel_loss_backward",
    "(Tensor grad, Tensor x, Tensor mean_q, Tensor var_q, Tensor mean_f, Tensor var_f, Tensor? mask, bool squared) -> Tensor",
)
torch.library.define(
    "normtweak::channel_loss_and_grad", "(Tensor x, Tensor mean_f, Tensor var_f, Tensor? mask, bool squared, Tensor(a!) out) -> Tensor"
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


@torch.library.impl("normtweak::channel_loss_and_grad", "default")
def _run_and_grad(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool, out: Tensor) -> Tensor:
    args = (x, mean_f, var_f, mask, squared, out)
    return registry.select("channel_loss_and_grad", *args).run(*args)


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


@torch.library.register_fake("normtweak::channel_loss_and_grad")
def _fake_and_grad(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool, out: Tensor) -> Tensor:
    return x.new_empty((), dtype=_statistics_dtype(x))


def _setup_context(ctx, inputs, output) -> None:
    x, mean_f, var_f, mask, ctx.squared = inputs
    _, mean_q, var_q = output
    ctx.save_for_backward(x, mean_q, var_q, mean_f, var_f, mask)
    ctx.mark_non_differentiable(mean_q, var_q)


def _backward(ctx, grad, _grad_mean, _grad_var):
    x, mean_q, var_q, mean_f, var_f, mask = ctx.saved_tensors
    grad_x = torch.ops.normtweak.channel_loss_backward(grad, x, mean_q, var_q, mean_f, var_f, mask, ctx.squared)
    return grad_x, None, None, None, None


def _second_backward(ctx, grad):
    raise ValueError("channel_loss: must be differentiated once, got a derivative of its gradient")


torch.library.register_autograd("normtweak::channel_loss", _backward, setup_context=_setup_context)
# Without this torch warns and leaves the gradient's own dependence on x out.
torch.library.register_autograd("normtweak::channel_loss_backward", _second_backward)


def channel_loss(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None = None, *, form: str = "absolute") -> Tensor:
    """Eq. 2 of the paper between the channels of `x` and the float model's statistics; differentiable in x (once).

    x: [..., C], float16, bfloat16, float32 or float64; accumulated in float32 (float64 for float64). mean_f, var_f: [C], float32 or float64, constants (no gradient);
    `ChannelStatistics` collects them. mask: bool, x's shape without C; True keeps a token. form: "absolute" or "squared".
    Returns a scalar, float32 (float64 for float64). NaN when the mask keeps no token
    (whether it does is not looked at: on a GPU that would wait for the device). Raises ValueError for other shapes, dtypes or forms.
    """
    mean_f, var_f = _checked(x, mean_f, var_f, mask, form)
    return torch.ops.normtweak.channel_loss(x, mean_f, var_f, mask, form == "squared")[0]


def channel_loss_and_grad(
    x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None = None, *, form: str = "absolute", out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`channel_loss` and its gradient dL/dx, without autograd; for `x.backward(gradient)`, or a chain rule of one's own.

    Arguments and errors as `channel_loss`. out: where the gradient goes, contiguous, of x's shape, dtype and device, in another storage than x; a new
    tensor if None. A buffer that is used again spares the page faults of a new one, which cost more than the computation when it is large.
    Returns the loss (see `channel_loss`) and the gradient in x's shape and dtype, which is `out` when given. With no token kept the loss is
    NaN, and the gradient NaN or 0.
    """
    mean_f, var_f = _checked(x, mean_f, var_f, mask, form)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _check_out(x, out)
    x = x.detach()
    return torch.ops.normtweak.channel_loss_and_grad(x, mean_f, var_f, mask, form == "squared", out), out


def _check_out(x: Tensor, out: Tensor) -> None:
    wanted, got = ((t.dtype, t.device, tuple(t.shape)) for t in (x, out))
    if wanted != got:
        raise ValueError(f"channel_loss: out must be {wanted[0]} {wanted[2]} on {wanted[1]}, got {got[0]} {got[2]} on {got[1]}")
    if not out.is_contiguous() or out.requires_grad:
        raise ValueError(f"channel_loss: out must be contiguous without requires_grad, got strides {out.stride()}, requires_grad {out.requires_grad}")
    if x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
        raise ValueError("channel_loss: out must be memory of its own, got x's storage")


def _checked(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, form: str) -> tuple[Tensor, Tensor]:
    """The float model's statistics in the dtype of the sums, after the checks that `channel_loss` promises."""
    if form not in ("absolute", "squared"):
        raise ValueError(f"channel_loss: form must be absolute or squared, got {form}")
    check_tokens("channel_loss", x, mask)
    for name, value in (("mean_f", mean_f), ("var_f", var_f)):
        if tuple(value.shape) != (x.shape[-1],):
            raise ValueError(f"channel_loss: {name} must be [{x.shape[-1]}], got {tuple(value.shape)}")
    if x.numel() == 0:
        raise ValueError(f"channel_loss: x must hold at least one token, got {tuple(x.shape)}")
    dtype = _statistics_dtype(x)
    return mean_f.detach().to(dtype), var_f.detach().to(dtype)
