"""Tasks from JSONL files, on lines made here."""

import json

import pytest
import torch

from normtweak import models
from normtweak.tasks import Choice, Passage, choose, last_words, log_likelihoods, read_choices, read_passages

LINES = {
    "hellaswag": {"ctx": "A man sits. he", "label": 1, "endings": ["flies.", "sits on."]},
    "piqa": {"query": "Question: How do I boil water?\n", "choices": ["Heat it.", "Cool it."], "gold": 0},
    "copa": {"query": "The sun rose, therefore", "choices": ["it got dark.", "it got light."], "gold": 1},
    "winogrande": {"context_options": ["Ann beat Eve so Ann", "Ann beat Eve so Eve"], "continuation": "won.", "gold": 0},
}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    return path


@pytest.fixture(scope="module")
def model(small_model):
    return models.load(small_model)


@pytest.fixture(scope="module")
def tokenizer(small_model):
    return models.ModelFolder(small_model).tokenizer


def test_the_forms_of_multiple_choice(tmp_path):
    file = write(tmp_path / "all.jsonl", *LINES.values())
    assert read_choices(file) == [
        Choice(("A man sits. he",) * 2, (" flies.", " sits on."), 1),
        Choice(("Question: How do I boil water?\nAnswer:",) * 2, (" Heat it.", " Cool it."), 0),
        Choice(("The sun rose, therefore",) * 2, (" it got dark.", " it got light."), 1),
        Choice(("Ann beat Eve so Ann", "Ann beat Eve so Eve"), (" won.", " won."), 0),
    ]
    assert read_choices(file, 2) == [read_choices(file)[0], read_choices(file)[2]]
    assert len(read_choices(file, 9)) == 4


def test_passages(tmp_path):
    file = write(tmp_path / "l.jsonl", {"context": "She gave him the ", "continuation": "book"}, {"context": "x", "continuation": " y"})
    assert read_passages(file) == [Passage("She gave him the", " book"), Passage("x", " y")]


def test_a_file_from_elsewhere(tmp_path):
    """A byte order mark, carriage returns, and in strings the characters at which str.splitlines cuts."""
    file = tmp_path / "l.jsonl"
    lines = [json.dumps({"context": "She\u2028gave\x85", "continuation": word}, ensure_ascii=False) for word in ("this", "that")]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    assert read_passages(file) == [Passage("She\u2028gave", " this"), Passage("She\u2028gave", " that")]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ({"context": 3, "continuation": "x"}, "AttributeError: 'int'"),
        ({"context": " ", "continuation": "x"}, "ValueError: an empty text"),
        ({"context": "a", "continuation": ""}, "ValueError: an empty text"),
    ],
)
def test_passages_that_will_not_do(tmp_path, line, error):
    with pytest.raises(ValueError, match=f"l.jsonl line 1 must be a JSON object with context, continuation, got {error}"):
        read_passages(write(tmp_path / "l.jsonl", line))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 must be a JSON object with query, .*, got JSONDecodeError"),
        ("[1]", "line 2 must be a JSON object with .*, got TypeError"),
        (json.dumps({"query": "x", "choices": ["a", "b"]}), "got KeyError: 'gold'"),
        (json.dumps({"query": "x", "choices": ["a", "b"], "gold": 2}), "got ValueError: the right choice is 2 of 2"),
        (json.dumps({"query": "x", "choices": ["a"], "gold": 0}), "got ValueError: the right choice is 0 of 1"),
        (json.dumps({"query": "x", "choices": "ab", "gold": 0}), "got TypeError: choices are str"),
        (json.dumps({"query": None, "choices": ["a", "b"], "gold": 0}), "got AttributeError: 'NoneType'"),
        (json.dumps({"query": "x", "choices": ["a", ""], "gold": 0}), "got ValueError: an empty text"),
        (json.dumps({"query": "", "choices": ["a", "b"], "gold": 0}), "got ValueError: an empty text"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(LINES["copa"]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_choices(file)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="eval: task must be a JSONL file, got .*nowhere"):
        read_choices(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="empty.jsonl must be a file with lines, got none"):
        read_passages(write(tmp_path / "empty.jsonl"))


def exact(model, tokenizer, context, continuation):
    """log p of each token of a continuation, one sequence alone, in float64."""
    before, both = (tokenizer(text, add_special_tokens=False).input_ids for text in (context, context + continuation))
    with torch.no_grad():
        logits = model(torch.tensor([both])).logits[0].double().log_softmax(-1)
    return torch.stack([logits[i - 1, both[i]] for i in range(len(before), len(both))])


def test_log_likelihoods_are_the_definition(model, tokenizer, monkeypatch):
    monkeypatch.setattr("normtweak.tasks.LOGITS", 60 * model.config.vocab_size)  # batches of two or three
    pairs = [("The cat ", "sat"), ("One", " upon a time"), ("Once there was a long, long story", " that ended"), ("ab", "c"), ("x", "y" * 20)]
    likelihoods, greedy = log_likelihoods(model, tokenizer, pairs, dtype=torch.float32)
    expected = torch.stack([exact(model, tokenizer, *pair).sum() for pair in [("The cat", " sat"), *pairs[1:]]])
    torch.testing.assert_close(likelihoods, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        best = model(tokenizer("ab", return_tensors="pt", add_special_tokens=False).input_ids).logits[0, -1].argmax()
    assert log_likelihoods(model, tokenizer, [("ab", tokenizer.decode(best))], dtype=torch.float32)[1].tolist() == [True]
    assert greedy[3] == (tokenizer.decode(best) == "c")


def test_what_is_too_long_loses_its_beginning(model, tokenizer):
    context = "abcdefghij" * 20
    (likelihood,), _ = log_likelihoods(model, tokenizer, [(context, "klm")], dtype=torch.float32)
    assert likelihood == pytest.approx(exact(model, tokenizer, context[-125:], "klm").sum().item(), rel=1e-5)


def test_choices(model, tokenizer, tmp_path):
    lines = [{"query": q, "choices": ["to be", "or not to be, that is", "!"], "gold": 1} for q in ("What", "Who", "When is it that")]
    questions = read_choices(write(tmp_path / "q.jsonl", *lines))
    plain, by_length = choose("q", model, tokenizer, questions, dtype=torch.float32)
    sums = [[exact(model, tokenizer, q.contexts[i], q.continuations[i]).sum().item() for i in range(3)] for q in questions]
    assert plain.samples.tolist() == [float(max(range(3), key=s.__getitem__) == 1) for s in sums]
    sizes = [len(choice) for choice in lines[0]["choices"]]
    assert by_length.samples.tolist() == [float(max(range(3), key=lambda i: s[i] / sizes[i]) == 1) for s in sums]
    assert (plain.task, plain.name, by_length.name) == ("q", "accuracy", "accuracy by length")
    (only,) = choose("w", model, tokenizer, read_choices(write(tmp_path / "w.jsonl", LINES["winogrande"])), dtype=torch.float32)
    won = [exact(model, tokenizer, context, " won.").sum() for context in LINES["winogrande"]["context_options"]]
    assert only.samples.tolist() == [float(won[0] > won[1])]


def test_last_words(model, tokenizer):
    passages = [Passage("She gave him the", " book"), Passage("They went to the", " sea")]
    accuracy, perplexity = last_words("l", model, tokenizer, passages, dtype=torch.float32)
    expected = torch.stack([exact(model, tokenizer, p.context, p.word).sum() for p in passages])
    assert perplexity.value.value == pytest.approx((-expected).mean().exp().item(), rel=1e-5)
    assert accuracy.samples.tolist() == [0, 0]
