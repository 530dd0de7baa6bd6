"""A tweaked model is better on text that nobody has seen, or as it was (benchmarks/never_worse.py asks the same of a real model)."""

import pytest
import torch

import normtweak
from normtweak import QuantizeConfig, models
from small_models import make_model

LENGTH = 32


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model that has learnt something, a noisy walk over 40 tokens: random weights predict nothing, so that nothing could be lost."""
    folder = make_model(tmp_path_factory.mktemp("walk") / "float")
    model = models.load(folder)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        tokens = walks(16, generator)
        adam.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        adam.step()
    model.save_pretrained(folder)
    return folder


def walks(count, generator):
    """Sequences that go round 40 tokens by 1, 2 or 3 steps at a time, by habits of the token."""
    steps = torch.randint(0, 6, (count, LENGTH), generator=generator)
    rows = [torch.randint(0, 40, (count,), generator=generator)]
    for column in steps.t()[1:]:
        rows.append((rows[-1] + torch.where(column < 4, rows[-1] % 3 + 1, column - 3)) % 40)
    return torch.stack(rows, 1) + 2


def divergence(model, exact, tokens):
    with torch.no_grad():
        p, q = exact(tokens).logits.log_softmax(-1), model(tokens).logits.log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item() / tokens.numel()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_never_worse(trained, tmp_path, method, bits, group_size, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    tokens, unseen = walks(64, generator), walks(256, generator)
    cell = {"method": method, "bits": bits, "group_size": group_size, "symmetric": bits > 2, "seed": seed, "compute_dtype": "float32"}
    normtweak.quantize(trained, out=tmp_path / "plain", config=QuantizeConfig.preset(tweak=None, **cell), tokens=tokens)
    report = normtweak.quantize(trained, out=tmp_path / "tweaked", config=QuantizeConfig.preset(**cell), tokens=tokens)
    exact = models.load(trained)
    before, after = (divergence(normtweak.load(tmp_path / name), exact, unseen) for name in ("plain", "tweaked"))
    assert after < before if report.norms_moved else after == before
