"""JSONL files, datasets and conversations as calibration text."""

import builtins
import importlib.util
import json
import sys
import types

import pytest
import torch

from calibrating import ids, run
from normtweak import CalibrationConfig, models
from normtweak.calibration import documents

TEXTS = ["Once upon a time.", "The end of it all, at last.", "", "One more line of text", "x" * 70]
CHAT = "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
TALK = [{"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "Yes, The One."}]} for i in range(8)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf8")
    return path


@pytest.fixture
def tokenizer(small_model):
    return models.ModelFolder(small_model).tokenizer


def test_sequences_begin_where_documents_begin(small_model, tokenizer, tmp_path):
    file = write(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    tokens = ids(small_model, source=str(file), samples=3, length=10)
    assert tokens.shape == (3, 10)
    starts = {text[:10] for text in TEXTS}
    for row in tokens:
        assert "".join(tokenizer.convert_ids_to_tokens(row.tolist()))[:10] in starts | {text[:10] for text in ("Once upon ", "The end of")}
    assert torch.equal(tokens, ids(small_model, source=str(file), samples=3, length=10))
    orders = {tuple(ids(small_model, seed=seed, source=str(file), samples=3, length=10)[:, 0].tolist()) for seed in range(6)}
    assert len(orders) > 1


def test_short_documents_follow_one_another_in_a_sequence(small_model, tokenizer, tmp_path):
    file = write(tmp_path / "text.jsonl", [{"body": "ab"}] * 30)
    (row,) = ids(small_model, source=str(file), samples=1, length=11, field="body").tolist()
    assert tokenizer.convert_ids_to_tokens(row) == list("ab\n\nab\n\nab\n")


def test_conversations_go_through_the_chat_template(tokenizer, tmp_path):
    tokenizer.chat_template = CHAT
    file = write(tmp_path / "talk.jsonl", TALK)
    config = CalibrationConfig(source=str(file), samples=4, length=30, chat=True)
    tokens = documents.sequences(config, tokenizer, 0)
    for row in tokens.tolist():
        text = "".join(tokenizer.convert_ids_to_tokens(row))
        assert text.startswith("<s>user:Question ")
        assert row[0] == tokenizer.bos_token_id
    assert torch.equal(tokens, documents.sequences(config, tokenizer, 0))


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        (['{"text": "a"}', "{"], {}, "line 2 must be a JSON object with text"),
        (['{"text": "a"}', '{"body": "b"}'], {}, r"line 2 must be an object with the field text \(see --field\), got body"),
        (['["text"]'], {}, r"line 1 must be an object with the field text \(see --field\), got list"),
        (['{"text": ["a"]}'], {}, r"line 1, text, must be text \(messages need --chat\), got list"),
        (['{"text": "short"}'], {}, "must be enough documents for 5 sequences of 20 tokens, got enough for 0"),
        (['{"messages": "a"}'], {"chat": True}, "chat must be off for a tokenizer without a chat template, got on"),
    ],
)
def test_lines_that_will_not_do(small_model, tmp_path, lines, changes, message):
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(lines), encoding="utf8")
    with pytest.raises(ValueError, match=f"calibration: .*{message}"):
        run(small_model, source=str(file), **changes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "a"}, "messages, must be a list of messages with role and content, got str"),
        ({"messages": [{"role": "user"}]}, "messages, must be a list of messages with role and content"),
        ({"messages": [{"role": "user", "content": "refused"}]}, "must be messages that the chat template takes, got TemplateError: refused"),
    ],
)
def test_conversations_that_will_not_do(tokenizer, tmp_path, row, message):
    tokenizer.chat_template = "{% if messages[0]['content'] == 'refused' %}{{ raise_exception('refused') }}{% endif %}x"
    file = write(tmp_path / "talk.jsonl", [row])
    with pytest.raises(ValueError, match=f"calibration: .*line 1.*{message}"):
        documents.sequences(CalibrationConfig(source=str(file), samples=1, length=8, chat=True), tokenizer, 0)


def test_lines_from_elsewhere(small_model, tmp_path):
    """A byte order mark, and in a string the characters at which str.splitlines cuts (which the small tokenizer leaves out)."""
    file = tmp_path / "text.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "The\u2028 cat\x85 sat"}, ensure_ascii=False).encode() + b"\r\n")
    plain = write(tmp_path / "plain.jsonl", [{"text": "The cat sat"}])
    assert torch.equal(*(ids(small_model, source=str(path), samples=1, length=9) for path in (file, plain)))


def test_a_missing_file(small_model):
    with pytest.raises(ValueError, match=r"calibration: source must be generated, random, a text file, a .jsonl file or hf:NAME, got none.jsonl"):
        run(small_model, source="none.jsonl")


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in that notes how it is called; a dataset named "missing" isn't there."""
    calls = []

    class Data(list):
        def shuffle(self, **settings):
            calls.append(("shuffle", settings))
            return Data(reversed(self))

    class DatasetDict(dict):
        pass

    rows = Data({"text": f"{i} The document number {i}."} for i in range(20))

    def load_dataset(*args, **settings):
        calls.append(("load_dataset", args, settings))
        if args[0] == "missing":
            raise FileNotFoundError("Couldn't find it\nand more")
        return rows

    def load_from_disk(folder):
        calls.append(("load_from_disk", folder))
        return DatasetDict(train=rows)

    module = types.ModuleType("datasets")
    module.load_dataset, module.load_from_disk, module.DatasetDict = load_dataset, load_from_disk, DatasetDict
    module.exceptions = types.SimpleNamespace(DatasetsError=RuntimeError)
    module.__spec__ = importlib.util.spec_from_loader("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_dataset_is_streamed_in_random_order(small_model, datasets):
    tokens = ids(small_model, seed=3, source="hf:owner/name", subset="one", split="test", samples=2, length=20)
    assert tokens.shape == (2, 20)
    assert datasets == [
        ("load_dataset", ("owner/name", "one"), {"split": "test", "streaming": True}),
        ("shuffle", {"seed": 3, "buffer_size": 10_000}),
    ]


def test_a_dataset_that_was_saved(small_model, datasets, tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert ids(small_model, source=f"hf:{tmp_path}", samples=2).shape == (2, 20)
    assert datasets == [("load_from_disk", str(tmp_path)), ("shuffle", {"seed": 0})]
    with pytest.raises(ValueError, match="calibration: source must be a dataset with such a subset and split, got KeyError: 'test'"):
        ids(small_model, source=f"hf:{tmp_path}", split="test")


def test_a_dataset_that_is_not_there(small_model, datasets):
    with pytest.raises(
        ValueError, match="calibration: source must be a dataset with such a subset and split, got FileNotFoundError: Couldn't find it$"
    ):
        run(small_model, source="hf:missing")
    with pytest.raises(ValueError, match="hf:some must be enough documents for 50 sequences of 20 tokens"):
        run(small_model, source="hf:some", samples=50)


def test_without_the_package(small_model, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "datasets" else find(name, *rest))
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: real(name, *rest) if name != "datasets" else pytest.fail("imported"))
    with pytest.raises(ValueError, match=r"hf:some read by the package datasets: pip install 'normtweak\[datasets\]', got no such package"):
        run(small_model, source="hf:some")
