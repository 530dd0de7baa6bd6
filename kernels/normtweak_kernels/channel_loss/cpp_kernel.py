"""channel_loss on the CPU: each direction reads x once, in one pass, csrc/cpu/channel_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native, registry


def _refuses(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool) -> str | None:
    return native.refuses(x, mean_f, var_f, mask)


def _refuses_statistics(x: Tensor, mask: Tensor | None) -> str | None:
    return native.refuses(x, mask)


def _refuses_grad(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool, out: Tensor) -> str | None:
    return native.refuses(x, mean_f, var_f, mask, out)


def _refuses_backward(grad: Tensor, x: Tensor, mean_q: Tensor, var_q: Tensor, mean_f: Tensor, var_f: Tensor, *rest: object) -> str | None:
    return native.refuses(grad, x, mean_q, var_q, mean_f, var_f)


def _tokens(x: Tensor, mask: Tensor | None) -> tuple[object, ...]:
    """What the C++ kernels take of x and the mask; both contiguous."""
    return native.address(x), native.DTYPES[x.dtype], native.address(mask), x.numel() // x.shape[-1], x.shape[-1]


@registry.register("channel_statistics", "cpp", _refuses_statistics)
def channel_statistics(x: Tensor, mask: Tensor | None) -> tuple[int, Tensor, Tensor]:
    """See statistics.py."""
    x, mask = x.contiguous(), _contiguous(mask)
    mean, m2 = (torch.empty(x.shape[-1], dtype=torch.float64, device="cpu") for _ in range(2))
    count = native.loaded().channel_statistics(torch.get_num_threads(), *_tokens(x, mask), native.address(mean), native.address(m2))
    return count, mean, m2


@registry.register("channel_loss", "cpp", _refuses)
def channel_loss(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See the package's docstring."""
    x, mask, mean_f, var_f = x.contiguous(), _contiguous(mask), mean_f.contiguous(), var_f.contiguous()
    mean_q, var_q = torch.empty_like(mean_f), torch.empty_like(var_f)
    loss = native.loaded().channel_loss(
        torch.get_num_threads(),
        *_tokens(x, mask),
        native.address(mean_f),
        native.address(var_f),
        squared,
        native.address(mean_q),
        native.address(var_q),
    )
    return torch.tensor(loss, dtype=torch.float32), mean_q, var_q


@registry.register("channel_loss_backward", "cpp", _refuses_backward)
def channel_loss_backward(
    grad: Tensor, x: Tensor, mean_q: Tensor, var_q: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool
) -> Tensor:
    """See the package's docstring."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    _write_gradient(grad.item(), x, mean_q, var_q, mean_f, var_f, mask, squared, grad_x)
    return grad_x


@registry.register("channel_loss_and_grad", "cpp", _refuses_grad)
def channel_loss_and_grad(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool, out: Tensor) -> Tensor:
    """See the package's docstring."""
    x, mask = x.contiguous(), _contiguous(mask)
    loss, mean_q, var_q = channel_loss(x, mean_f, var_f, mask, squared)
    _write_gradient(1.0, x, mean_q, var_q, mean_f, var_f, mask, squared, out)
    return loss


def _write_gradient(
    grad: float, x: Tensor, mean_q: Tensor, var_q: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool, out: Tensor
) -> None:
    x, mask, mean_q = x.contiguous(), _contiguous(mask), mean_q.contiguous()
    d_mean, d_var = mean_q - mean_f, var_q - var_f
    slope_mean, slope_var = (2 * d_mean, 2 * d_var) if squared else (d_mean.sign(), d_var.sign())
    kept = x.numel() // x.shape[-1] if mask is None else int(mask.sum())
    factor = grad / (x.shape[-1] * max(kept, 1))
    offset, slope = slope_mean * factor, slope_var * (2 * factor)
    native.loaded().channel_loss_backward(
        torch.get_num_threads(), *_tokens(x, mask), native.address(mean_q), native.address(offset), native.address(slope), native.address(out)
    )


def _contiguous(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()
