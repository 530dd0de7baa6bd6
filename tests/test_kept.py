"""Generated text is kept: a second run takes it, a killed one is gone on with, and anything else that changes makes it another text."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from calibrating import author, ids, run
from normtweak import CalibrationConfig, calibration, models
from normtweak.calibration import generated, kept
from normtweak.progress import Silent
from small_models import make_model


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(generated, "GENERATION_BATCH", 2)


def files():
    return sorted(path.name for path in kept.path_of("any").parent.glob("*")) if kept.path_of("any").parent.is_dir() else []


def test_a_second_run_loads_no_model(small_model):
    first = run(small_model)
    assert len(files()) == 1

    def load():
        raise AssertionError("the model was loaded")

    second = calibration.prepare(CalibrationConfig(samples=5, length=20), author(small_model, load=load), 0)(Silent())
    assert torch.equal(first.tokens, second.tokens)
    assert (second.report.ends, second.report.unusable) == (first.report.ends, first.report.unusable)
    assert second.report.tokens_per_second == 0
    assert "from the cache" in str(second.report)


def test_no_cache_keeps_nothing_and_writes_the_same(small_model):
    assert torch.equal(ids(small_model, cache=False), ids(small_model, cache=False))
    assert files() == []
    assert torch.equal(ids(small_model, cache=False), ids(small_model))


@pytest.mark.parametrize("changes", [{"samples": 4}, {"length": 21}, {"greedy_tokens": 2}, {"languages": "any"}, {"languages": "en:1"}])
def test_other_settings_are_another_text(small_model, changes):
    run(small_model)
    run(small_model, **changes)
    assert len(files()) == 2


def test_another_seed_model_or_precision_is_another_text(small_model, tmp_path):
    run(small_model)
    run(small_model, seed=1)
    assert len(files()) == 2
    other = make_model(tmp_path / "other", tie_word_embeddings=True)
    with torch.no_grad():
        model = models.load(other)
        model.model.norm.weight[0] += 1
        model.save_pretrained(other)
    run(other)
    assert len(files()) == 3
    calibration.prepare(CalibrationConfig(samples=5, length=20), author(small_model, identity=lambda: "bfloat16"), 0)(Silent())
    assert len(files()) == 4


@pytest.mark.parametrize("batches", [1, 2])
def test_an_interrupted_run_is_gone_on_with(small_model, monkeypatch, batches):
    whole = ids(small_model, cache=False)
    writes = []
    original = generated._Writer.write

    def stop(self, *args):
        if len(writes) == batches:
            raise KeyboardInterrupt
        writes.append(1)
        return original(self, *args)

    monkeypatch.setattr(generated._Writer, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        run(small_model)
    made = []
    monkeypatch.setattr(generated._Writer, "write", lambda self, *args: made.append(1) or original(self, *args))
    assert torch.equal(ids(small_model), whole)
    assert len(made) == 3 - batches


def test_a_killed_process_is_gone_on_with(small_model, tmp_path):
    """SIGKILL between two batches."""
    code = """
import sys, time
from normtweak import CalibrationConfig, calibration, models
from normtweak.calibration import Author, generated, kept
from normtweak.progress import Silent
generated.GENERATION_BATCH = 2
original = kept.write
def write(path, draft):
    original(path, draft)
    print(len(draft.tokens), flush=True)
    time.sleep(60)
kept.write = write
folder = models.ModelFolder(models.resolve(sys.argv[1]))
author = Author(folder.tokenizer, folder.config.vocab_size, "llama", lambda: models.load(sys.argv[1]), folder.digest)
calibration.prepare(CalibrationConfig(samples=5, length=20), author, 0)(Silent())
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code, str(small_model)], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == "2"
        process.send_signal(signal.SIGKILL)
    (path,) = (tmp_path / "normtweak" / "calibration").iterdir()
    kept.path_of("any").parent.mkdir(parents=True)
    path.rename(kept.path_of(path.stem))
    whole = ids(small_model, cache=False)
    began = kept.read(kept.path_of(path.stem), 5, 20)
    assert torch.equal(began.tokens, whole[:2])
    assert torch.equal(ids(small_model), whole)
    assert len(files()) == 1  # it was this file that the run went on with


def test_a_damaged_file_is_replaced(small_model, caplog):
    whole = ids(small_model)
    (path,) = kept.path_of("any").parent.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(ids(small_model), whole)
    assert "is damaged" in caplog.text
    assert kept.read(path, 5, 20) is not None


def test_a_folder_that_cannot_be_written_is_said_so(small_model, monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kept, "cache_folder", lambda: tmp_path / "file")
    assert ids(small_model).shape == (5, 20)
    assert "can't be kept in" in caplog.text


def test_a_full_disk_costs_the_draft_alone(small_model, monkeypatch, caplog):
    def full(*_):
        raise kept.SafetensorError("No space left on device")

    monkeypatch.setattr(kept, "save_file", full)
    assert ids(small_model).shape == (5, 20)
    assert "can't be kept in" in caplog.text and "No space left" in caplog.text


def test_nothing_temporary_is_left(small_model):
    run(small_model)
    assert [name for name in files() if not name.endswith(".safetensors")] == []


def test_texts_begin_behind_a_leading_bos(small_model, monkeypatch):
    monkeypatch.setattr(generated, "leading_bos", lambda tokenizer: 0)
    tokens = ids(small_model, samples=3, length=60)
    (path,) = kept.path_of("any").parent.iterdir()
    draft = kept.read(path, 3, 60)
    assert (tokens[:, 0] == 0).all()
    assert not draft.begins[:, 0].any()
    assert draft.begins[:, 1].all()
    allowed = {"The", "One", "Once"}
    begun = models.ModelFolder(small_model).tokenizer.convert_ids_to_tokens(tokens[draft.begins].tolist())
    assert set(begun) <= allowed
    assert draft.ends == int(draft.begins[:, 2:].sum())
