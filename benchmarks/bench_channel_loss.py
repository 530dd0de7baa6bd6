"""channel_loss, forward and backward, beside plain torch, torch.compile and the time that moving its bytes takes.

python benchmarks/bench_channel_loss.py [--rounds N]    ratios, all contenders in turn in one process; run.py notes each by itself
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import interleaved
from normtweak_kernels import channel_loss, channel_loss_and_grad
from shapes import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(x: Tensor, mean_f: Tensor, var_f: Tensor) -> Tensor:
    """The loss as one writes it in torch."""
    x = x.float()
    mean = x.mean(0)
    var = (x - mean).square().mean(0)
    return ((mean - mean_f).abs() + (var - var_f).abs()).mean()


def contenders(tokens: int, channels: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """floor: x is read twice and the gradient written, the least that two passes over memory can do."""
    x = torch.randn(tokens, channels, dtype=dtype)
    leaf = x.clone().requires_grad_()
    out, statistics = torch.zeros_like(x), (torch.zeros(channels), torch.ones(channels))
    words = x.view(torch.float32)  # a sum of 16-bit values would convert each

    def autograd(loss: Callable[..., Tensor]) -> Callable[[], object]:
        def step() -> None:
            leaf.grad = None
            loss(leaf, *statistics).backward()

        return step

    def floor() -> None:
        words.sum()
        out.copy_(x)

    return {
        "eager": autograd(plain),
        "torch.compile": autograd(torch.compile(plain, dynamic=False)),
        "fresh gradient": autograd(channel_loss),
        "reused gradient": lambda: channel_loss_and_grad(x, *statistics, out=out),
        "floor": floor,
    }


def case(tokens: int, channels: int, dtype: torch.dtype) -> str:
    return f"T={tokens} C={channels} {str(dtype).removeprefix('torch.')} forward + backward"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("tokens", "channels"), ACTIVATIONS)
@pytest.mark.parametrize("variant", ["eager", "torch.compile", "fresh gradient", "reused gradient", "floor"])
def test_forward_and_backward(measure, variant, tokens, channels, dtype):
    # x is read by either direction, the gradient is written.
    moved = 3 * tokens * channels * dtype.itemsize
    measure(contenders(tokens, channels, dtype)[variant], op="channel_loss", variant=variant, case=case(tokens, channels, dtype), moved=moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="the median is over so many (default: 9)")
    rounds = parser.parse_args().rounds
    for tokens, channels in ACTIVATIONS:
        for dtype in DTYPES:
            seconds = interleaved.medians(contenders(tokens, channels, dtype), rounds)
            print(interleaved.table(case(tokens, channels, dtype), seconds, "reused gradient"), flush=True)


if __name__ == "__main__":
    main()
