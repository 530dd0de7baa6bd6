"""`normtweak paper`: which quantizations an experiment runs, each once; an interrupted run goes on; tables, CSV, figure."""

import csv
import importlib.util
import json
import shutil
from dataclasses import replace

import pytest
import torch

from normtweak import models
from normtweak.config import QuantizeConfig
from normtweak.paper import drift, experiments, figure, lab
from normtweak.paper.lab import Evaluation
from normtweak.paper.run import Request, run
from normtweak.paper.tables import Line, as_table, write_csv
from normtweak.progress import Silent
from test_cli import in_process

CALIBRATION = {"samples": 4, "length": 24}


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    """Per-channel W4 and W2 in groups that fit the small model, on random tokens."""
    monkeypatch.setitem(experiments.W2, "group_size", 32)
    monkeypatch.setattr(experiments, "ITERATIONS", (1, 2))


@pytest.fixture
def evaluation(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    words = tmp_path / "words.jsonl"
    words.write_text("".join(json.dumps({"context": f"Once {i}", "continuation": "more"}) + "\n" for i in range(4)))
    return Evaluation((str(text),), 4, 32, (words,))


@pytest.fixture
def quantized(monkeypatch):
    """What is quantized, by preset-like key; nothing is quantized twice."""
    done = []
    original = lab.quantize

    def quantize(model, *, out, config, tokens, progress, device):
        done.append(config)
        return original(model, out=out, config=config, tokens=tokens, progress=progress, device=device)

    monkeypatch.setattr(lab, "quantize", quantize)
    return done


def request(**changes):
    return Request(**({"seeds": 2, "samples": 4, "length": 24, "rows": "W4"} | changes))


def finish(*args):
    return list(run(*args, Silent()))


def rows_of(file):
    with file.open(encoding="utf8") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture
def drawn(monkeypatch):
    """Figures that would be drawn, file and lines, without matplotlib."""
    found = []
    monkeypatch.setattr("normtweak.paper.run.check_matplotlib", lambda: None)
    monkeypatch.setattr("normtweak.paper.run.draw", lambda file, title, lines: found.append((file, lines)))
    return found


def test_tables_and_figures_share_their_quantizations(small_model, evaluation, tmp_path, quantized, drawn):
    out = tmp_path / "out"
    finish(small_model, request(tables=(2, 3), figures=(1,)), evaluation, out)
    assert len(quantized) == len(set(quantized)) == 6  # 3 methods x 2 seeds
    assert {config.seed for config in quantized} == {0, 1}
    rows = rows_of(out / "table2.csv")
    assert {row["method"] for row in rows} == {"GPTQ, no tweak", "+ NT (paper)", "+ NT (default)"}
    assert {row["figure"] for row in rows} == {"text.txt perplexity", "words accuracy", "words perplexity"}
    for row in rows:
        values = torch.tensor([float(value) for value in row["values"].split()], dtype=torch.float64)
        assert len(values) == int(row["seeds"]) == 2
        assert float(row["mean"]) == pytest.approx(values.mean().item())
        assert float(row["standard_error"]) == pytest.approx(values.std().item() / 2**0.5)
    assert {row["figure"] for row in rows_of(out / "table3.csv")} == {"CPU seconds", "seconds"}
    assert not (out / "quantized").exists()
    before = len(quantized)
    again = finish(small_model, request(tables=(2,)), evaluation, out)
    assert len(quantized) == before
    assert again[-1].title == experiments.TABLES[2].title
    assert rows_of(out / "table2.csv") == rows


def test_the_float_model_is_measured_once(small_model, evaluation, tmp_path, quantized):
    out = tmp_path / "out"
    finish(small_model, request(tables=(2,), rows="float"), evaluation, out)
    assert quantized == []
    row, *_ = rows_of(out / "table2.csv")
    assert (row["scheme"], row["seeds"], row["standard_error"]) == ("float", "1", "")


def test_an_interrupted_run_goes_on(small_model, evaluation, tmp_path, quantized, monkeypatch):
    whole = finish(small_model, request(tables=(2,), seeds=1), evaluation, tmp_path / "whole")
    assert len(whole) == 4
    expected = rows_of(tmp_path / "whole" / "table2.csv")
    quantized.clear()
    lines = run(small_model, request(tables=(2,), seeds=1), evaluation, tmp_path / "out", Silent())
    next(lines), next(lines)  # the second line comes when the first quantization is finished
    lines.close()
    (tmp_path / "out" / "quantized").mkdir()  # as a killed run leaves it
    assert len(quantized) == 1
    finish(small_model, request(tables=(2,), seeds=1), evaluation, tmp_path / "out")
    assert len(quantized) == 3
    assert rows_of(tmp_path / "out" / "table2.csv") == expected


def test_other_models_texts_and_settings_are_other_results(small_model, evaluation, tmp_path):
    def path(folder=small_model, evaluation=evaluation, config=None, seed=0):
        return lab.Lab(str(folder), evaluation, tmp_path, Silent()).path(config or QuantizeConfig(), seed)

    copy = shutil.copytree(small_model, tmp_path / "copy")
    text = tmp_path / "other.txt"
    text.write_text("Another text altogether. " * 40)
    assert path() == path() == path(copy)
    (copy / "generation_config.json").write_text('{"eos_token_id": 3}')
    words = tmp_path / "words.jsonl"
    others = [
        path(copy),
        path(seed=1),
        path(config=QuantizeConfig(bits=8)),
        path(evaluation=Evaluation((str(text),), 4, 32)),
        path(evaluation=Evaluation(evaluation.texts, 5, 32, (words,))),
        path(evaluation=Evaluation(evaluation.texts, 4, 32, (words,), limit=2)),
    ]
    assert len({path(), *others}) == 7
    words.write_text(words.read_text() + words.read_text())
    assert path() not in others


def test_rows_that_are_not_chosen_may_be_ones_that_cannot_be_made(small_model, evaluation, tmp_path, quantized, monkeypatch):
    rows = experiments.TABLES[4].rows
    impossible = experiments.Row(("magic", "no tweak"), "default", {"method": "magic"})
    monkeypatch.setitem(experiments.TABLES, 4, replace(experiments.TABLES[4], rows=lambda scope: [impossible, *rows(scope)]))
    with pytest.raises(ValueError, match="method must be one of .*, got magic"):
        finish(small_model, request(tables=(4,), rows=""), evaluation, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    finish(small_model, request(tables=(4,), rows="RTN.*no tweak", seeds=1), evaluation, tmp_path / "out")
    assert [(config.method, config.needs_calibration) for config in quantized] == [("rtn", False)]


@pytest.mark.parametrize("number", [6, 8, 9])
def test_an_experiments_rows(number, tmp_path):
    scope = experiments.Scope(experiments.CalibrationConfig(**CALIBRATION), (str(tmp_path / "wiki.txt"),), "en:1")
    rows = list(experiments.TABLES[number].rows(scope))
    assert len({row.config for row in rows}) == len({row.labels for row in rows}) == len(rows)
    configs = [row.config for row in rows]
    if number == 6:
        assert [c.tweak.iterations if c.tweak else 0 for c in configs] == [0, 1, 2]
    if number == 9:
        assert [c.tweak.loss if c.tweak else None for c in configs] == [None, *experiments.LOSSES]
        assert {c.tweak.target_stream for c in configs if c.tweak} == {"quantized"}
    if number == 8:
        texts = [(c.calibration.source, c.calibration.languages) for c in configs[::3]]
        assert texts == [("random", None), ("generated", "any"), ("generated", "en:1"), (str(tmp_path / "wiki.txt"), None)]


def test_the_literal_tweak_is_the_papers():
    scope = experiments.Scope(experiments.CalibrationConfig(**CALIBRATION))
    for row in experiments.TABLES[2].rows(scope):
        if row.labels[-1] == experiments.LITERAL:
            tweak = row.config.tweak
            assert (tweak.loss, tweak.target_stream, tweak.step, tweak.iterations, row.config.polish) == ("channel", "quantized", "absolute", 1, None)


def test_drift_is_what_the_blocks_say(small_model):
    model, other = models.load(small_model), models.load(small_model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    windows = torch.randint(2, 90, (3, 16))
    own, theirs = (drift.channel_statistics(m, windows, torch.float32, Silent()) for m in (model, other))
    values = drift.drift(own, theirs)
    assert values["block 0 mean"] == values["block 0 variance"] == 0
    hidden, others = (m.model.layers[1].register_forward_hook for m in (model, other))
    seen = {}
    handles = [hidden(lambda *a: seen.update(own=a[2])), others(lambda *a: seen.update(other=a[2]))]
    with torch.no_grad():
        model(windows)
        other(windows)
    for handle in handles:
        handle.remove()
    a, b = (seen[name][:, 1:].flatten(0, 1).double() for name in ("own", "other"))
    assert values["block 1 mean"] == pytest.approx((a.mean(0) - b.mean(0)).abs().mean().item(), rel=1e-4)
    assert values["block 1 variance"] == pytest.approx((a.var(0, correction=0) - b.var(0, correction=0)).abs().mean().item(), rel=1e-3)
    assert not model.model.layers[0]._forward_hooks


def test_a_figure(small_model, evaluation, tmp_path, drawn):
    finish(small_model, request(figures=(1,), seeds=1, rows="W4.*(no tweak|paper)"), evaluation, tmp_path / "out")
    ((file, lines),) = drawn
    assert file.name == "figure1.png"
    assert [line.labels[1] for line in lines] == ["GPTQ, no tweak", "+ NT (paper)"]
    assert set(lines[0].values) == {f"block {i} {kind}" for i in range(2) for kind in ("mean", "variance")}
    assert all(value > 0 for line in lines for values in line.values.values() for value in values)


def test_without_matplotlib(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest))
    with pytest.raises(ValueError, match=r"figure must be drawn by matplotlib: pip install 'normtweak\[paper\]', got no such package"):
        figure.check_matplotlib()


def test_a_table_on_the_terminal_and_as_csv(tmp_path):
    lines = [Line(("a",), {"x": [1.0, 2.0, 3.0], "y": [1.0]}), Line(("b",), {"x": [4.0]})]
    table = as_table("title", ("name",), lines)
    assert [list(column.cells) for column in table.columns] == [["a", "b"], ["2 ± 0.58", "4"], ["1", "-"]]
    write_csv(tmp_path / "t.csv", ("name",), lines)
    assert [(row["name"], row["figure"], row["mean"], row["seeds"]) for row in rows_of(tmp_path / "t.csv")] == [
        ("a", "x", "2.0", "3"),
        ("a", "y", "1.0", "1"),
        ("b", "x", "4.0", "1"),
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "paper: table, figure must be asked for, one of them at least, got neither"),
        (["--table", "5"], "paper: table must be one of 2, 3, 4, 6, 7, 8, 9, got 5"),
        (["--figure", "2"], "paper: figure must be one of 1, got 2"),
        (["--table", "7"], "paper: table 7 must be given tasks by --choice or --lambada, got none"),
        (["--table", "2", "--seeds", "0"], "paper: seeds must be 1 or more, got 0"),
        (["--table", "2", "--rows", "("], "paper: rows must be a regular expression"),
        (["--table", "2", "--rows", "zzz"], "paper: rows must be found in a label of Table 2"),
        (["--table", "2", "--text", "a/x.txt", "--text", "b/x.txt"], "paper: text must be files called differently, since results have their names"),
        (["--table", "8", "--calibration", "a/x.txt", "--calibration", "b/x.txt"], "paper: calibration must be files called differently"),
        (["--table", "2", "--text", "none.txt"], "eval: text must be a text file"),
        (["--table", "2", "--window-length", "1000"], "paper: length must be at most the model's 128 positions, got 1000"),
        (["--table", "2", "--length", "1000"], "paper: length must be at most the model's 128 positions, got 1000"),
        (["--table", "8", "--calibration", "none.txt"], "source must be generated, random or a text file, got none.txt"),
        (["--table", "8", "--languages", "zh:1"], "languages must be ones that the tokenizer has words of, got zh"),
    ],
)
def test_wrong_input_is_found_before_anything_is_run(small_model, tmp_path, monkeypatch, quantized, args, message):
    monkeypatch.chdir(tmp_path)
    given = ["--window-length", "32", "--length", "24", "--samples", "4", "--windows", "4", *args]
    code, _, stderr = in_process("paper", "--model", small_model, "--out", "out", *given)
    assert code == 2
    assert message in stderr
    assert stderr.count("\n") == 1
    assert quantized == []
    assert not (tmp_path / "out").exists()
