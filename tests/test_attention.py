import pytest
import torch
from torch.nn import functional

from normtweak import attention, models
from small_models import make_model

WINDOW = {"sliding_window": 3, "query_pre_attn_scalar": 16}


FAMILIES = [
    ("llama", {}),
    ("gemma2", WINDOW),
    ("qwen3", {}),
    ("gpt2", {}),
    ("opt", {}),
    ("gpt_neox", {}),
    ("bloom", {}),
    ("falcon", {"head_dim": None, "num_key_value_heads": None, "num_kv_heads": 2}),
    ("phi3", {}),
]


@pytest.mark.parametrize(("model_type", "settings"), FAMILIES)
def test_attention_while_text_is_written_is_the_models_own(tmp_path, model_type, settings):
    model = models.load(make_model(tmp_path / "model", model_type, **settings))
    tokens = torch.randint(2, 90, (3, 9))
    with torch.no_grad():
        expected, before = model(tokens).logits, model.config._attn_implementation
        with attention.decoding(model):
            first = model(tokens[:, :5], use_cache=True)
            steps = [first.logits]
            for column in tokens[:, 5:].split(1, 1):
                steps.append(model(column, past_key_values=first.past_key_values, use_cache=True).logits)
    assert model.config._attn_implementation == before
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [2, 6])
def test_grouped_attention_is_the_formula(heads):
    query, key, value = torch.randn(3, heads, 4, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 5)
    mask, bias, sinks = torch.randn(3, 1, 4, 9), torch.randn(1, heads, 4, 7), torch.randn(heads)
    found, _ = attention.grouped_attention(None, query, key, value, mask, scaling=0.3, softcap=2.0, s_aux=sinks, position_bias=bias, dropout=0.0)
    query, key, value, mask, bias, sinks = (t.double() for t in (query, key, value, mask, bias, sinks))
    key, value = (t.repeat_interleave(heads // 2, 1) for t in (key, value))
    scores = torch.exp(2 * torch.tanh(torch.einsum("bhld,bhtd->bhlt", query, key) * 0.3 / 2) + mask[..., :7] + bias)
    shares = scores / (scores.sum(-1, keepdim=True) + sinks.exp().view(1, -1, 1, 1))
    torch.testing.assert_close(found.double(), torch.einsum("bhlt,bhte->blhe", shares, value), rtol=1e-5, atol=1e-6)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model_type", "settings"), FAMILIES)
def test_blockwise_attention_is_the_models_own(tmp_path, monkeypatch, model_type, settings):
    monkeypatch.setattr(attention, "QUERIES", 4)
    model = models.load(make_model(tmp_path / "model", model_type, **settings))
    tokens = torch.randint(2, 90, (3, 11))
    found = []
    for _ in range(2):
        loss = model(tokens).logits.square().mean()
        found.append((loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.dim() == 1], allow_unused=True)))
        attention.use_blockwise(model, model.device)
    # Gemma 2 has eager attention for its soft caps, Bloom and Falcon have code of their own
    assert model.config._attn_implementation == {"gemma2": "eager", "bloom": "eager", "falcon": "sdpa"}.get(model_type, "normtweak_blockwise")
    for own, expected in zip(*found, strict=True):
        if own is not None or expected is not None:
            close(own, expected)


@pytest.mark.parametrize("shape", [(2, 6, 2, 130, 16), (1, 4, 4, 64, 8), (1, 3, 1, 65, 8), (2, 2, 1, 1, 4)])
@pytest.mark.parametrize("kind", ["causal", "bool", "added", "bias", "none"])
def test_blockwise_attention_is_the_fused_one(shape, kind):
    batch, heads, groups, length, width = shape
    torch.manual_seed(0)
    # as models hand them over: heads behind positions in memory
    query, key, value = (
        torch.randn(batch, length, count, width, dtype=torch.float64).transpose(1, 2).requires_grad_() for count in (heads, groups, groups)
    )
    seen = torch.rand(batch, 1, length, length) < 0.7
    seen |= torch.eye(length, dtype=torch.bool)
    bias = torch.randn(1, heads, length, length, dtype=torch.float64)
    given = {"bool": seen, "added": bias[:, :1]}.get(kind)
    options = {"scaling": 0.3, "is_causal": kind in ("causal", "bias"), "position_bias": bias if kind == "bias" else None}
    found, _ = attention.blockwise_attention(None, query, key, value, given, **options)
    mask = bias + torch.zeros(length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf) if kind == "bias" else given
    expected = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=kind == "causal", scale=0.3, enable_gqa=True
    ).transpose(1, 2)  # fmt: skip
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(found)
    own, others = (torch.autograd.grad(y, (query, key, value), gradient) for y in (found, expected))
    for one, other in zip(own, others, strict=True):
        torch.testing.assert_close(one, other)


def test_blockwise_attention_multiplies_in_autocasts_dtype():
    query = torch.randn(1, 2, 70, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = attention.blockwise_attention(None, query, query, query, None)
    expected = functional.scaled_dot_product_attention(query, query, query, is_causal=True).transpose(1, 2)
    assert found.dtype == torch.bfloat16
    assert not torch.equal(found.float(), expected)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
