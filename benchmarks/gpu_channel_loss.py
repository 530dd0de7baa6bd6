"""The channel loss and its gradient on a GPU beside plain torch and the copy of x that two passes over memory can't be faster than."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from normtweak_kernels import channel_loss_and_grad

ACTIVATIONS = [(16384, 576), (16384, 4096), (4096, 8192)]
DTYPES = [torch.bfloat16, torch.float32]
DEVICE = "cuda"


def plain(x: torch.Tensor, mean_f: torch.Tensor, var_f: torch.Tensor) -> torch.Tensor:
    """The gradient as one writes it in torch."""
    values = x.float()
    mean = values.mean(0)
    centred = values - mean
    var = centred.square().mean(0)
    return (((mean - mean_f).sign() + 2 * (var - var_f).sign() * centred) / x.numel()).to(x.dtype)


def cases() -> Iterator[tuple[str, int, int, dict[str, Callable[[], object]]]]:
    """(case, bytes moved, operations, calls), see gpu.py. moved: x is read by either direction, the gradient is written."""
    for tokens, channels in ACTIVATIONS:
        for dtype in DTYPES:
            x = torch.randn(tokens, channels, device=DEVICE).to(dtype)
            out, mask = torch.empty_like(x), torch.rand(tokens, device=DEVICE) < 0.9
            statistics = (torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE))
            compiled = torch.compile(plain, dynamic=False)

            def floor(x=x, out=out) -> None:
                x.view(torch.float32).sum()
                out.copy_(x)

            yield (
                f"T={tokens} C={channels} {str(dtype).removeprefix('torch.')} loss + gradient",
                3 * x.nbytes,
                0,
                {
                    "triton": lambda x=x, statistics=statistics, out=out: channel_loss_and_grad(x, *statistics, out=out),
                    "triton, mask": lambda x=x, statistics=statistics, out=out, mask=mask: channel_loss_and_grad(x, *statistics, mask, out=out),
                    "torch": lambda x=x, statistics=statistics: plain(x, *statistics),
                    "torch.compile": lambda x=x, statistics=statistics, compiled=compiled: compiled(x, *statistics),
                    "floor": floor,
                },
            )
