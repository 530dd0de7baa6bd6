import pytest
import torch
from torch import nn

from normtweak.norms import gain_offset, is_norm, norm_parameters


class GemmaLikeRMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.input_norm = norm
        self.linear = nn.Linear(8, 8)


@pytest.mark.parametrize(("norm", "offset"), [(nn.LayerNorm(8), 0.0), (nn.RMSNorm(8), 0.0), (GemmaLikeRMSNorm(8), 1.0)])
def test_offset_is_found_by_asking_the_norm(norm, offset):
    assert is_norm(norm)
    before = norm.weight.clone()
    assert gain_offset(norm) == offset
    assert torch.equal(norm.weight, before)


class GatedRMSNorm(nn.RMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * torch.sigmoid(gate)


def test_a_norm_with_a_gate_can_be_asked_too():
    assert gain_offset(GatedRMSNorm(8)) == 0.0


@pytest.mark.parametrize("module", [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Embedding(8, 8), nn.LayerNorm(8, elementwise_affine=False)])
def test_what_is_no_norm(module):
    assert not is_norm(module)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), GemmaLikeRMSNorm(8)])
def test_masters_start_at_the_parameters(norm, relative):
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(8))
    found = norm_parameters(Block(norm), relative=relative)
    assert [p.name for p in found] == [f"input_norm.{name}" for name, _ in norm.named_parameters()]
    for parameter in found:
        assert parameter.master.dtype == torch.float32
        torch.testing.assert_close(parameter.value(), norm.get_parameter(parameter.name.rpartition(".")[2]))


def test_relative_steps_act_on_the_effective_gain():
    norm = GemmaLikeRMSNorm(8)
    nn.init.normal_(norm.weight)
    (parameter,) = norm_parameters(Block(norm), relative=True)
    with torch.no_grad():
        parameter.master.fill_(0.1)
    torch.testing.assert_close(1 + parameter.value(), 1.1 * (1 + norm.weight))


def test_bias_moves_on_the_scale_of_the_gain():
    norm = nn.LayerNorm(8)
    nn.init.constant_(norm.weight, -3.0)
    _, bias = norm_parameters(Block(norm), relative=True)
    with torch.no_grad():
        bias.master.fill_(0.1)
    torch.testing.assert_close(bias.value(), torch.full((8,), 0.3))


def test_a_block_without_norms_is_refused():
    with pytest.raises(ValueError, match="tweak: the block must hold a LayerNorm or RMSNorm, got Linear"):
        norm_parameters(nn.Linear(4, 4), relative=True)
