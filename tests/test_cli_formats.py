"""The commands about packed checkpoints: convert, tweak, eval --card; quantize --format."""

import json
import re

import pytest

from small_models import make_packed
from test_cli import in_process

TEXT = ["--calibration", "random", "--samples", 4, "--length", 24]


@pytest.fixture(scope="module")
def packed(small_model, tmp_path_factory):
    return make_packed(small_model, tmp_path_factory.mktemp("packed") / "out", bits=2)


def method_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]


def test_convert_and_inspect(packed, tmp_path):
    code, stdout, stderr = in_process("convert", packed, "--out", tmp_path / "out", "--format", "compressed-tensors")
    assert code == 0, stderr
    assert "MB, compressed-tensors" in stdout
    assert method_of(tmp_path / "out") == "compressed-tensors"
    code, stdout, stderr = in_process("inspect", tmp_path / "out")
    assert code == 0, stderr
    assert "pack-quantized" in stdout
    assert "14 of 2 bits in groups of 32, symmetric" in stdout


def test_quantize_in_another_format(small_model, tmp_path):
    options = ["--method", "rtn", "--no-tweak", "--group-size", 32, "--format", "compressed-tensors"]
    code, _, stderr = in_process("quantize", small_model, "--out", tmp_path / "out", *options)
    assert code == 0, stderr
    assert method_of(tmp_path / "out") == "compressed-tensors"


def test_tweak(packed, small_model, tmp_path):
    code, stdout, stderr = in_process("tweak", packed, "--float", small_model, "--out", tmp_path / "out", "--seed", 1, *TEXT)
    assert code == 0, stderr
    assert "polish: KL to float" in stdout
    assert "norm tensors changed" in stdout
    note = json.loads((tmp_path / "out" / "normtweak.json").read_text())["retweak"]["config"]
    assert (note["seed"], note["calibration"]["samples"], note["tweak"]["learning_rate"]) == (1, 4, 2e-3)
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"polish": {"learning_rate": 0.02}, "seed": 7}))
    code, _, stderr = in_process("tweak", packed, "--float", small_model, "--out", tmp_path / "b", "--polish-only", "--config", settings, *TEXT)
    assert code == 0, stderr
    note = json.loads((tmp_path / "b" / "normtweak.json").read_text())["retweak"]["config"]
    assert (note["tweak"], note["polish"]["learning_rate"], note["seed"]) == (None, 0.02, 7)


def test_tweak_says_what_it_calibrated_on(small_model, tmp_path):
    packed = make_packed(small_model, tmp_path / "packed")
    options = ["--samples", 4, "--length", 24, "--polish-only"]
    code, stdout, stderr = in_process("tweak", packed, "--float", small_model, "--out", tmp_path / "out", *options)
    assert code == 0, stderr
    assert "calibration text (generated): 4 x 24 tokens" in stdout
    note = json.loads((tmp_path / "out" / "normtweak.json").read_text())["retweak"]
    assert (note["calibration_tokens"], note["calibration"]["sequences"]) == (96, 4)


def test_tweak_takes_the_calibration_options_of_quantize(packed, small_model, tmp_path):
    lines = tmp_path / "LINES.JSONL"
    lines.write_text((json.dumps({"body": "The One Once. " * 40}) + "\n") * 30)
    options = ["--calibration", lines, "--field", "body", "--samples", 4, "--length", 24, "--no-cache", "--polish-only"]
    code, _, stderr = in_process("tweak", packed, "--float", small_model, "--out", tmp_path / "out", *options)
    assert code == 0, stderr
    text = json.loads((tmp_path / "out" / "normtweak.json").read_text())["retweak"]["config"]["calibration"]
    assert (text["field"], text["cache"]) == ("body", False)


def test_texts_of_one_name_would_be_one_on_the_card(small_model, tmp_path):
    folder = make_packed(small_model, tmp_path / "packed")
    code, _, stderr = in_process("eval", folder, "--text", "a/x.txt", "--text", "b/x.txt", "--card")
    assert (code, stderr) == (2, "normtweak: eval: text must be files called differently, since results have their names, got x.txt, x.txt\n")


def test_scores_go_to_the_card(small_model, tmp_path):
    folder = make_packed(small_model, tmp_path / "packed")
    text = tmp_path / "text.txt"
    text.write_text("The One Once. " * 40)
    code, _, stderr = in_process("eval", folder, "--against", small_model, "--text", text, "--windows", 3, "--length", 20, "--card")
    assert code == 0, stderr
    assert "- perplexity on text.txt: " in (folder / "README.md").read_text()
    assert json.loads((folder / "normtweak.json").read_text())["scores"]["text.txt"]["kl"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tweak", "PACKED", "--float", "FLOAT", "--out", "OUT", "--languages", "xx"], "languages must be any, family, or languages and shares"),
        (["tweak", "PACKED", "--float", "FLOAT", "--out", "OUT", "--samples", "0"], "samples must be 1 or more, got 0"),
        (["tweak", "PACKED", "--float", "FLOAT", "--out", "OUT", "--calibration", "x.json"], "source must be a .jsonl file, one object a line"),
        (["convert", "PACKED", "--out", "OUT", "--format", "awq"], "formats: format must be one of gptq, gptq_v2, compressed-tensors, got awq"),
        (["convert", "FLOAT", "--out", "OUT", "--format", "gptq"], "must be a packed checkpoint, got a float model"),
        (
            ["quantize", "FLOAT", "--out", "OUT", "--format", "gguf"],
            "QuantizeConfig: format must be one of auto, gptq, gptq_v2, compressed-tensors, got gguf",
        ),
        (
            ["quantize", "FLOAT", "--out", "OUT", "--format", "gptq", "--asymmetric"],
            "format must be auto, gptq_v2 or compressed-tensors for asymmetric",
        ),
        (["tweak", "FLOAT", "--float", "FLOAT", "--out", "OUT"], "must be a packed checkpoint, got a float model"),
        (["tweak", "PACKED", "--float", "PACKED", "--out", "OUT"], "tweak: float must be a float model, got one quantized by gptq"),
        (["tweak", "PACKED", "--float", "FLOAT", "--out", "OUT"], "tweak: length must be at most the model's 128 positions, got 256"),
        (["tweak", "PACKED", "--float", "FLOAT", "--out", "OUT", "--no-polish", "--polish-only"], "RetweakConfig: tweak, polish must be given"),
        (["tweak", "PACKED", "--float", "FLOAT", "--out", "OUT", "--config", "none.json"], "tweak: config must be a JSON file, got none.json"),
        (["eval", "FLOAT", "--length", "20", "--card"], "card: .* must be a folder that normtweak wrote, got another"),
    ],
)
def test_wrong_input_is_one_line(packed, small_model, tmp_path, args, message):
    places = {"PACKED": packed, "FLOAT": small_model, "OUT": tmp_path / "out"}
    code, stdout, stderr = in_process(*(places.get(arg, arg) for arg in args))
    assert (code, stdout) == (2, "")
    assert stderr.count("\n") == 1
    assert re.search(message, stderr)
    assert list(tmp_path.iterdir()) == []
