import pytest
import torch
from shapes import ACTIVATIONS

from normtweak_kernels import channel_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "channels"), ACTIVATIONS)
@pytest.mark.parametrize("variant", ["reference", "cpp"])
def test_forward_and_backward(measure, variant, tokens, channels, dtype):
    x = torch.randn(tokens, channels, dtype=dtype, requires_grad=True)
    mean, var = torch.zeros(channels), torch.ones(channels)

    def step():
        x.grad = None
        channel_loss(x, mean, var).backward()

    # x is read by either direction, the gradient is written.
    case = f"T={tokens} C={channels} {str(dtype).removeprefix('torch.')} forward + backward"
    measure(step, op="channel_loss", variant=variant, case=case, moved=3 * x.nbytes)
