"""Scales that move between a norm or a linear and what reads it leave the float block's function as it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normtweak import families, models
from normtweak.folding import Fold, applied, balanced, folds_of
from small_models import make_model
from test_families import SMALL


def presented(folder):
    """A float model in float64, what can be quantized presented as nn.Linear, its blocks and their path, its family."""
    source = models.ModelFolder(folder)
    model = source.skeleton()
    path = models.present_blocks(model)
    source.weights.fill(model, skip=models.tied_names(model))
    model.tie_weights()
    return model.double(), model.get_submodule(path), families.find(source.config)


@pytest.mark.parametrize("name", SMALL)
def test_folding_alone_changes_nothing(tmp_path, name):
    model_type, extra = SMALL[name]
    model, blocks, family = presented(make_model(tmp_path / "float", model_type, **{"num_key_value_heads": 4} | extra))
    tokens = torch.randint(2, 90, (2, 20))
    with torch.no_grad():
        before = model(tokens).logits
        for block in blocks:
            folds = folds_of(block, "", family)
            for fold in folds:
                fold.apply(torch.rand(fold.channels, dtype=torch.float64) * 3 + 0.3)
        after = model(tokens).logits
    # the norms compute in float32 whatever the model's dtype
    assert (after - before).norm() < 1e-6 * before.norm()
    readers = {path for fold in folds for path in fold.readers}
    sources = sum(1 for fold in folds if isinstance(fold.source, nn.Linear))
    if "behind" in name:
        assert not [fold for fold in folds if not isinstance(fold.source, nn.Linear)]
    else:
        assert readers
    expected = {"llama": 2, "gemma3": 2, "opt": 1, "mixtral": 1 + 4, "qwen2_moe": 2, "gpt2": 0, "glm": 1, "phi": 1}
    assert name not in expected or sources == expected[name]


def test_grouped_values_stay(tmp_path):
    _, blocks, family = presented(make_model(tmp_path / "float", num_key_value_heads=2))
    assert {path for fold in folds_of(blocks[0], "", family) if isinstance(fold.source, nn.Linear) for path in fold.readers} == {"mlp.down_proj"}


def test_an_unknown_family_has_none(tmp_path):
    _, blocks, family = presented(make_model(tmp_path / "float", "stablelm"))
    assert family is None
    assert folds_of(blocks[0], "", family) == []


@settings(max_examples=30, deadline=None)
@given(channels=st.integers(1, 40), readers=st.integers(1, 3), bias=st.booleans(), seed=st.integers(0, 99), of_linear=st.booleans())
def test_a_scale_moves_and_comes_back(channels, readers, bias, seed, of_linear):
    torch.manual_seed(seed)
    source = nn.Linear(7, channels, bias=bias) if of_linear else nn.LayerNorm(channels, bias=bias)
    fold = Fold(source.double(), {str(i): nn.Linear(channels, 5).double() for i in range(readers)})
    x = torch.randn(3, 7 if of_linear else channels, dtype=torch.float64)

    def outputs():
        return torch.stack([reader(source(x)) for reader in fold.readers.values()])

    before = outputs()
    kept = [p.detach().clone() for p in fold.parameters()]
    scale = torch.rand(channels, dtype=torch.float64) * 10 + 0.01
    with applied([fold, fold], [scale, scale.flip(0)]):
        torch.testing.assert_close(outputs(), before)
        assert any(not torch.equal(p, k) for p, k in zip(fold.parameters(), kept, strict=True))
    assert all(torch.equal(p, k) for p, k in zip(fold.parameters(), kept, strict=True))
    torch.testing.assert_close(balanced(scale).log().mean(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(balanced(scale) / scale, (balanced(scale) / scale)[:1].expand(channels))
