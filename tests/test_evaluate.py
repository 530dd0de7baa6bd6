import math
import sys
import types

import pytest
import torch

from normtweak import evaluate, models
from normtweak.estimates import Estimate, Metric
from normtweak.evaluate import PYTHON_DOCS, Suite, compare, harness, read_text, score, text_windows


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
    assert same.ratio.value == pytest.approx(1)
    beside = score(other, tokenizer, windows)
    assert result.ratio.value == pytest.approx(result.perplexity / beside.perplexity, rel=1e-6)
    assert result.ratio.interval[0] < result.ratio.value < result.ratio.interval[1]


def test_the_standard_error_is_that_of_the_windows(small_model, tokenizer):
    model = models.load(small_model)
    windows = torch.randint(2, 90, (6, 12))
    alone = torch.tensor([score(model, tokenizer, window[None]).perplexity for window in windows]).double().log()
    result = score(model, tokenizer, windows)
    assert result.standard_error == pytest.approx(result.perplexity * alone.std().item() / 6**0.5, rel=1e-3)
    assert score(model, tokenizer, windows[:1]).standard_error is None


def test_texts(tmp_path):
    assert len(read_text(PYTHON_DOCS)) > 100_000
    with pytest.raises(ValueError, match="eval: text must be a text file or python-docs, got nowhere"):
        read_text("nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        read_text(str(tmp_path / "binary"))


def test_models_are_compared_by_task_and_metric():
    right, wrong = torch.tensor([1.0, 1, 1, 0]), torch.tensor([1.0, 0, 1, 0])
    ours = [Metric.of("a", "accuracy", right), Metric("b", "f1", Estimate(0.5, None)), Metric.of("c", "accuracy", right)]
    theirs = [Metric.of("a", "accuracy", wrong), Metric("b", "f1", Estimate(0.4, 0.1))]
    first, second, third = compare(ours, theirs)
    assert (first.value.value, first.other.value, first.difference.value) == (0.75, 0.5, 0.25)
    assert second.other == Estimate(0.4, 0.1)
    assert second.difference is None  # no items to pair
    assert third.other is None
    assert compare(ours)[0].other is None


@pytest.fixture
def lm_eval(monkeypatch):
    """A stand-in with lm-eval's interface and the shape of its results (as of 0.4.13)."""
    seen = {}

    def simple_evaluate(model, tasks, limit):
        seen.update(model=model, tasks=tasks, limit=limit)
        samples = [{"doc_id": i, "filter": "none", "metrics": ["acc"], "acc": float(i % 2), "f1": (1, 0)} for i in (2, 0, 1, 3)]
        return {
            "results": {
                "rte": {
                    "name": "rte",
                    "alias": "rte",
                    "sample_len": 4,
                    "acc,none": 0.5,
                    "acc_stderr,none": 0.28,
                    "f1,none": 0.4,
                    "f1_stderr,none": "N/A",
                },
                "group": {"alias": "group", "acc,none": 0.7, "acc_stderr,none": 0.1},
                "sum": {"alias": "sum", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1},
            },
            "samples": {"rte": samples},
        }

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            self.pretrained = pretrained

    class TaskManager:
        all_tasks = ("rte", "group", "sum")

    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, members in parts.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: types.ModuleType(name))
    return seen


def test_lm_evals_tasks(lm_eval):
    model = object()
    rte, f1, group, strict = harness(model, None, ["rte", "group", "sum"], limit=4)
    assert lm_eval["model"].pretrained is model
    assert (lm_eval["tasks"], lm_eval["limit"]) == (["rte", "group", "sum"], 4)
    assert (rte.task, rte.name, rte.value, rte.samples.tolist()) == ("rte", "acc", Estimate(0.5, 0.28), [0, 1, 0, 1])
    assert (f1.value, f1.samples) == (Estimate(0.4, None), None)
    assert (group.value, group.samples) == (Estimate(0.7, 0.1), None)
    assert strict.name == "exact_match (strict-match)"
    with pytest.raises(ValueError, match="eval: tasks must be lm-eval's tasks or files of that kind, got rtte"):
        harness(model, None, ["rte", "rtte"])


def test_lm_eval_without_its_data(lm_eval, monkeypatch):
    def fails(**kwargs):
        raise ConnectionError("no hub\nand more")

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", fails)
    with pytest.raises(ValueError, match="eval: tasks must be ones whose data lm-eval can load, got ConnectionError: no hub$"):
        harness(None, None, ["rte"])


def test_lm_eval_missing(monkeypatch):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"eval: tasks must be run by lm-eval: pip install 'normtweak\[eval\]', got no such package"):
        Suite.read([], [], ["rte"])
