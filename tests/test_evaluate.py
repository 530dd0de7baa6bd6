import math

import pytest
import torch

from normtweak import models
from normtweak.evaluate import PYTHON_DOCS, read_text, score, text_windows


@pytest.fixture
def tokenizer(small_model):
    return models.ModelFolder(small_model).tokenizer


def test_windows_are_evenly_spaced(tokenizer):
    text = "abcdefghij" * 10
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    windows = text_windows(tokenizer, text, 4, 7)
    assert [w.tolist() for w in windows] == [ids[i : i + 7].tolist() for i in (0, 25, 50, 75)]
    with pytest.raises(ValueError, match="eval: text must be at least windows x length = 120 tokens long, got 100 tokens"):
        text_windows(tokenizer, text, 4, 30)


def test_perplexity_is_the_definition(small_model, tokenizer):
    model = models.load(small_model)
    windows = torch.randint(2, 90, (5, 12))
    with torch.no_grad():
        log_probabilities = model(windows).logits.double().log_softmax(-1)
    nll = -log_probabilities[:, :-1].gather(-1, windows[:, 1:, None]).mean().item()
    assert score(model, tokenizer, windows, batch_size=2).perplexity == pytest.approx(math.exp(nll), rel=1e-5)


def test_against_itself_and_another(small_model, tokenizer):
    model, other = models.load(small_model), models.load(small_model)
    windows = torch.randint(2, 90, (3, 12))
    same = score(model, tokenizer, windows, against=other)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1_agreement == 1.0
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
        p, q = other(windows).logits.double().log_softmax(-1), model(windows).logits.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)[:, :-1].mean().item()
    result = score(model, tokenizer, windows, against=other)
    assert result.kl == pytest.approx(expected, rel=1e-4)
    assert result.perplexity == pytest.approx(same.perplexity)


def test_texts(tmp_path):
    assert len(read_text(PYTHON_DOCS)) > 100_000
    with pytest.raises(ValueError, match="eval: text must be a text file or python-docs, got nowhere"):
        read_text("nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        read_text(str(tmp_path / "binary"))
