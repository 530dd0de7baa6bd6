"""The command line as a user meets it; each command once in its own process, its variants in this one."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import pytest
import torch

from normtweak import cli, terminal
from small_models import make_model, make_packed

SMALL = ["--calibration", "random", "--samples", "4", "--length", "24"]


def normtweak(*args, **kwargs):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "normtweak", *map(str, args)], capture_output=True, text=True, env=environment, timeout=300, **kwargs
    )


def in_process(*args):
    """Exit code, stdout, stderr of the same command without a new interpreter."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["normtweak", *map(str, args)])
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(terminal.console, "width", 200)
        patch.setattr(terminal.errors, "width", 200)
        with pytest.raises(SystemExit) as exited:
            cli.main()
    return exited.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def packed(small_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "out"
    result = normtweak("quantize", small_model, "--out", out, "--bits", 4, "--group-size", 32, *SMALL)
    assert result.returncode == 0, result.stderr
    return out, result


def test_quantize_says_what_it_did(packed):
    out, result = packed
    assert "block 0: quantized" in result.stdout
    assert "block 1: quantized" in result.stdout
    assert "polish: KL to float" in result.stdout
    assert "peak memory" in result.stdout
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_quantize_says_what_it_calibrated_on(small_model, tmp_path):
    options = ["--samples", 4, "--length", 24, "--method", "rtn", "--no-polish", "--bits", 8]
    written = []
    for name, extra in (("a", []), ("b", []), ("c", ["--no-cache"]), ("d", ["--languages", "any"])):
        code, stdout, stderr = in_process("quantize", small_model, "--out", tmp_path / name, *options, *extra)
        assert code == 0, stderr
        written.append(json.loads((tmp_path / name / "normtweak.json").read_text())["calibration"])
        assert "calibration text (generated): 4 x 24 tokens" in stdout
        assert "of the sequences unusable" in stdout
        assert ("from the cache" in stdout) == (name == "b")
    assert [entry["tokens_per_second"] > 0 for entry in written] == [True, False, True, True]
    assert [written[0][key] == written[1][key] for key in ("ends", "unusable", "sequences")] == [True] * 3


def test_extra_samples_are_for_the_polish(small_model, packed, tmp_path):
    options = ["--samples", 4, "--length", 24, "--extra-samples", 3]
    for command in (["quantize", small_model, "--method", "rtn"], ["tweak", packed[0], "--float", small_model]):
        code, stdout, stderr = in_process(*command, "--out", tmp_path / command[0], *options)
        assert code == 0, stderr
        assert "polish: KL to float" in stdout
        code, _, stderr = in_process(*command, "--out", tmp_path / "none", *options, "--no-polish")
        assert (code, (tmp_path / "none").exists()) == (2, False)
        assert f"{command[0]}: extra_samples must be left out" in stderr
    recipe = json.loads((tmp_path / "quantize" / "normtweak.json").read_text())
    assert (recipe["calibration"]["sequences"], recipe["config"]["polish"]["extra_samples"]) == (7, 3)


def test_eval(packed, small_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    file = tmp_path / "scores.json"
    result = normtweak("eval", packed[0], "--against", small_model, "--text", text, "--windows", 4, "--length", 32, "--json", file)
    assert result.returncode == 0, result.stderr
    assert "perplexity" in result.stdout
    scores = json.loads(file.read_text())["scores"][str(text)]
    assert scores["perplexity"] > 1
    assert 0 < scores["kl"] < 1
    assert 0 < scores["top1_agreement"] <= 1


def test_eval_of_tasks(packed, small_model, tmp_path):
    (tmp_path / "copa.jsonl").write_text(
        "".join(json.dumps({"query": f"Once {i}", "choices": ["it was", "they were"], "gold": i % 2}) + "\n" for i in range(6))
    )
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"context": f"Once {i}", "continuation": "more"}) + "\n" for i in range(6)))
    tasks = ["--choice", tmp_path / "copa.jsonl", "--lambada", tmp_path / "words.jsonl", "--limit", 4]
    code, stdout, stderr = in_process("eval", packed[0], "--against", small_model, *tasks, "--json", tmp_path / "scores.json")
    assert code == 0, stderr
    assert "KL" not in stdout  # no text was asked for
    written = json.loads((tmp_path / "scores.json").read_text())
    rows = {(row["task"], row["metric"]): row for row in written["tasks"]}
    assert set(rows) == {("words", "accuracy"), ("words", "perplexity"), ("copa", "accuracy"), ("copa", "accuracy by length")}
    row = rows["words", "perplexity"]
    assert row["difference"]["value"] == pytest.approx(row["value"]["value"] / row["other"]["value"])
    assert row["difference"]["interval"][0] < row["difference"]["value"] < row["difference"]["interval"][1]
    assert written["limit"] == 4


def test_warming_without_a_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = in_process("bench", "--warm")
    assert (code, out) == (2, "")
    assert err == "normtweak: bench: warm must be called on a machine with a GPU for Triton's kernels, got no GPU\n"
    assert in_process("bench")[2] == "normtweak: bench: warm must be asked for with --warm, got nothing to do\n"


def test_warming_takes_each_shape_of_a_checkpoint_once(packed, small_model):
    from normtweak import warm

    found = warm.shapes(packed[0])
    assert found == sorted(set(found))
    assert {(bits, k // groups, symmetric) for _, k, bits, groups, symmetric in found} == {(4, 32, True)}
    hidden = json.loads((packed[0] / "config.json").read_text())["hidden_size"]
    assert (hidden, hidden) in {(n, k) for n, k, *_ in found}
    with pytest.raises(ValueError, match="bench: model must be a packed checkpoint, got"):
        warm.shapes(small_model)


def test_generate_in_another_precision(packed):
    result = normtweak("generate", packed[0], "--prompt", "The ", "--max-new-tokens", 5, "--dtype", "bfloat16", "--activations", "int8")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The ")


def test_generate(packed):
    result = normtweak("generate", packed[0], "--prompt", "The ", "--max-new-tokens", 5)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The ")
    assert "5 tokens in" in result.stderr
    again = [in_process("generate", packed[0], "--prompt", "The ", "--max-new-tokens", 5, "--temperature", 1, "--seed", seed) for seed in (3, 3, 4)]
    assert all(code == 0 for code, _, _ in again)
    assert again[0][1] == again[1][1] != again[2][1]


def test_inspect(packed, small_model):
    code, stdout, stderr = in_process("inspect", packed[0])
    assert code == 0, stderr
    for word in ("llama", "gptq", "recipe", "input_layernorm (LlamaRMSNorm)", "dequant_gemm on cpu"):
        assert word in stdout
    assert in_process("inspect", small_model)[0] == 0


def test_what_is_written_is_written_as_it_is(small_model, tmp_path, monkeypatch):
    """Not folded at the terminal's width, no :emoji: and no [markup] in texts, names and patterns."""
    prompt = "a :smile:\t[b]c[/d]" + "x" * 40
    monkeypatch.setattr(terminal.console, "width", 60)
    code, stdout, stderr = in_process("generate", small_model, "--prompt", prompt, "--max-new-tokens", 60)
    assert code == 0, stderr
    assert stdout.startswith(prompt)
    assert stdout.count("\n") == stdout.rstrip("\n").count("\n") + 1
    (tmp_path / "a[").mkdir()
    text = tmp_path / "a[" / "b].txt"
    text.write_text("The quick brown fox. " * 9)
    code, stdout, stderr = in_process("eval", small_model, "--text", text, "--windows", 2, "--length", 16)
    assert code == 0, stderr
    assert "a[/b].txt" in stdout
    packed = make_packed(small_model, tmp_path / "out", skip=["[a-j]_proj"])
    assert "['[a-j]_proj']" in in_process("inspect", packed)[1]


def test_inspect_of_norms_tweaked_afterwards(small_model, packed, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(packed[0], theirs)
    (theirs / "normtweak.json").unlink()
    for source, out in ((theirs, tmp_path / "a"), (packed[0], tmp_path / "b")):
        code, _, stderr = in_process("tweak", source, "--float", small_model, "--out", out, "--polish-only", *SMALL)
        assert code == 0, stderr
        code, stdout, stderr = in_process("inspect", out)
        assert code == 0, stderr
        assert "norms tweaked afterwards" in stdout
        assert ("recipe" in stdout) == (out.name == "b")


def test_help_is_good_reading():
    result = normtweak("--help")
    assert result.returncode == 0
    for command in ("quantize", "eval", "generate", "inspect", "demo"):
        assert command in result.stdout
    assert "--group-size" in normtweak("quantize", "--help").stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["quantize", "no/such-model", "--out", "OUT"], "model: no/such-model must be"),
        (["quantize", "MODEL", "--out", "OUT", "--group-size", "48"], "group_size must be a divisor"),
        (["quantize", "MODEL", "--out", "OUT", "--bits", "6"], "bits must be one of 2, 3, 4, 5, 8, got 6"),
        (
            ["quantize", "MODEL", "--out", "OUT", "--module", "up_proj:4"],
            "ModuleOverride: text must be PATTERN=BITS or PATTERN=BITS:GROUP_SIZE, got up_proj:4",
        ),
        (["quantize", "MODEL", "--out", "OUT", "--skip", "nothing"], "quantize: skip must be patterns found in a linear's path"),
        (["quantize", "MODEL", "--out", "MODEL"], "out must be a new or empty folder"),
        (["quantize", "MODEL", "--out", "OUT", "--rounding", "gptq"], "rounding must be nearest for gptq, which rounds in its own way, got gptq"),
        (["quantize", "MODEL", "--out", "OUT", "--method", "magic"], "method must be one of gptq, rtn, awq, smoothquant, autoround, got magic"),
        (["quantize", "MODEL", "--out", "OUT", "--preset", "best"], "preset must be one of default, paper, got best"),
        (["quantize", "MODEL", "--out", "OUT", "--calibration", "none.txt", "--length", "24"], "source must be generated, random or a text file"),
        (["quantize", "MODEL", "--out", "OUT", "--languages", "en"], "CalibrationConfig: languages must be any, family, or languages and shares"),
        (
            ["quantize", "MODEL", "--out", "OUT", "--languages", "zh:1", "--length", "24"],
            "languages must be ones that the tokenizer has words of, got zh",
        ),
        (["quantize", "MODEL", "--out", "OUT", "--chat"], "CalibrationConfig: chat must be left out unless the source is a .jsonl file or hf:NAME"),
        (["quantize", "MODEL", "--out", "OUT", "--config", "none.json"], "config must be a JSON file, got none.json (No such file"),
        (["eval", "MODEL", "--text", "none.txt"], "eval: text must be a text file"),
        (["quantize", "MODEL", "--out", "OUT", "--lr", "0.1", "--lr-search"], "quantize: lr must be left out with --lr-search, got 0.1"),
        (["quantize", "MODEL", "--out", "OUT", "--loss", "kl", "--no-tweak"], "quantize: loss must be left out with --no-tweak, got given"),
        (["quantize", "MODEL", "--out", "OUT", "--preset", "paper", "--lr-search"], "TweakConfig: held_out must be above 0 to find a learning rate"),
        (["quantize", "MODEL", "--out", "OUT", "--loss", "l1"], "loss must be one of channel, channel_squared, token_mse, mse, kl, got l1"),
        (["quantize", "MODEL", "--out", "OUT"], "quantize: length must be at most the model's 128 positions, got 256"),
        (["quantize", "MODEL", "--out", "OUT", "--config", "."], "config must be a JSON file, got . (Is a directory)"),
        (["eval", "MODEL", "--length", "200"], "eval: length must be at most the model's 128 positions, got 200"),
        (["eval", "MODEL", "--length", "20", "--json", "no/where.json"], "where.json must be in a folder that exists"),
        (["eval", "MODEL", "--length", "20", "--json", "."], "checkpoint: . must be a file, got a folder"),
        (["generate", "MODEL", "--prompt", "\u00e9"], "generate: prompt must be text that the tokenizer has tokens for, got '\u00e9'"),
        (["eval", "MODEL", "--length", "20", "--dtype", "fp32"], "compute_dtype: name must be auto, float32 or bfloat16, got fp32"),
        (["eval", "MODEL", "--windows", "0", "--length", "20"], "eval: windows, length must be at least 1 and 2"),
        (["eval", "MODEL", "--lambada", "none.jsonl"], "eval: task must be a JSONL file, got none.jsonl"),
        (["eval", "MODEL", "--choice", "a/x.jsonl", "--lambada", "b/x.jsonl"], "eval: files must be called differently"),
        (["generate", "MODEL", "--prompt", "a", "--activations", "int3"], "load: activations must be one of auto, int16, int8, int8_token, got int3"),
        (["generate", "MODEL", "--prompt", "a", "--dtype", "float8"], "name must be auto, float32 or bfloat16, got float8"),
        (["generate", "MODEL", "--prompt", ""], "generate: prompt must be some text"),
        (["demo", "--samples", "1"], "demo: samples must be 2 or more, as the polish holds one out, got 1"),
        (["demo", "--length", "4"], "CalibrationConfig: length must be 8 or more tokens, got 4"),
        (["inspect", "./nowhere"], "model: ./nowhere must be a model folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(small_model, tmp_path, monkeypatch, args, message):
    names = {"MODEL": small_model, "OUT": tmp_path / "out"}
    monkeypatch.chdir(tmp_path)
    code, _, stderr = in_process(*[names.get(arg, arg) for arg in args])
    assert code == 2
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_key_in_a_config_file(small_model, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"damp": 0.1}))
    result = normtweak("quantize", small_model, "--out", tmp_path / "out", "--config", file)
    assert result.returncode == 2
    assert "QuantizeConfig: key must be one of bits" in result.stderr
    assert "got damp" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    file.write_text("{")
    code, _, stderr = in_process("quantize", small_model, "--out", tmp_path / "out", "--config", file)
    assert code == 2
    assert "config must be a JSON file" in stderr


def test_the_config_file_counts_unless_an_option_is_given(small_model, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"bits": 2, "group_size": 32, "symmetric": False, "calibration": {"source": "random", "samples": 3, "length": 20}}))
    code, _, stderr = in_process("quantize", small_model, "--out", tmp_path / "out", "--config", file, "--bits", 3, "--samples", 2, "--no-tweak")
    assert code == 0, stderr
    recipe = json.loads((tmp_path / "out" / "normtweak.json").read_text())
    config = recipe["config"]
    assert (config["bits"], config["group_size"], config["symmetric"], config["tweak"]) == (3, 32, False, None)
    assert recipe["calibration_tokens"] == 40
    assert recipe["seconds"]["blocks"] > 0


def test_modules_of_their_own(small_model, tmp_path):
    options = ["--module", "mlp.down_proj=8:16", "--module", r"layers\.1\.=2", "--skip", "k_proj", "--lm-head", "--method", "rtn", "--no-tweak"]
    code, _, stderr = in_process("quantize", small_model, "--out", tmp_path / "out", "--group-size", 32, *options, *SMALL)
    assert code == 0, stderr
    settings = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert settings["lm_head"] is True
    assert settings["dynamic"][r"-:model\.layers\.\d+\.self_attn\.k_proj$"] == {}
    assert settings["dynamic"][r"+:model\.layers\.\d+\.mlp\.down_proj$"] == {"bits": 8, "group_size": 16}
    assert settings["dynamic"][r"+:model\.layers\.1\.mlp\.up_proj$"] == {"bits": 2, "group_size": 32}
    code, stdout, _ = in_process("inspect", tmp_path / "out")
    assert code == 0
    assert "2 of 8 bits in groups of 16, symmetric" in stdout


def test_the_schedule(small_model, tmp_path):
    options = ["--bits", 2, "--group-size", 32, "--loss", "channel", "--iterations", 2, "--lr-search"]
    code, _, stderr = in_process("quantize", small_model, "--out", tmp_path / "out", *options, *SMALL)
    assert code == 0, stderr
    recipe = json.loads((tmp_path / "out" / "normtweak.json").read_text())
    tweak = recipe["config"]["tweak"]
    assert (tweak["loss"], tweak["iterations"], tweak["learning_rate"]) == ("channel", 2, None)
    assert recipe["config"]["polish"]["learning_rate"] is None
    assert recipe["polish"]["rate"] > 0


def test_models_of_different_vocabularies_are_not_compared(small_model, tmp_path):
    other = make_model(tmp_path / "other", vocab_size=200)
    code, _, stderr = in_process("eval", small_model, "--against", other, "--length", 20)
    assert code == 2
    assert "eval: against must be a model with the same vocabulary" in stderr


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_no_more_tokens_than_positions(tmp_path, model_type):
    """GPT-2's are learned: there is none behind the last. A BOS in front takes one too."""
    from tokenizers import Tokenizer, processors

    folder = make_model(tmp_path / "float", model_type, n_positions=128, n_embd=64, n_layer=2, n_head=4)
    file = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(file)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9)
    assert in_process("eval", folder, "--text", text, "--windows", 1, "--length", 127)[0] == 0
    code, _, stderr = in_process("eval", folder, "--text", text, "--windows", 1, "--length", 128)
    assert (code, len(stderr.splitlines())) == (2, 1)
    assert "eval: length must be at most the model's 128 positions less one for the BOS in front, got 128" in stderr
    assert in_process("generate", folder, "--prompt", "x" * 117, "--max-new-tokens", 10)[0] == 0
    code, _, stderr = in_process("generate", folder, "--prompt", "x" * 118, "--max-new-tokens", 10)
    assert (code, len(stderr.splitlines())) == (2, 1)
    assert "generate: prompt with max_new_tokens must be at most the model's 128 positions, got 119 + 10" in stderr


def test_another_models_tokenizer_is_one_line(tmp_path):
    folder = make_model(tmp_path / "float", vocab_size=60)
    text, task = tmp_path / "text.txt", tmp_path / "task.jsonl"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9)
    task.write_text('{"context": "The quick", "continuation": "fox {~}"}\n')
    for command in (
        ["quantize", folder, "--out", tmp_path / "out", "--calibration", text, "--samples", 2, "--length", 24],
        ["eval", folder, "--text", text, "--windows", 2, "--length", 24],
        ["eval", folder, "--lambada", task],
        ["generate", folder, "--prompt", "{~}"],
    ):
        code, _, stderr = in_process(*command)
        assert (code, len(stderr.splitlines())) == (2, 1), stderr
        assert "the tokenizer must be the model's own, with ids below 60, got id" in stderr


@pytest.mark.parametrize("name", ["polish", "tweak", "calibration"])
def test_a_table_of_a_configuration_file_that_is_none(small_model, tmp_path, name):
    file = tmp_path / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({name: 3}).encode())
    code, _, stderr = in_process("quantize", small_model, "--out", tmp_path / "out", "--config", file, "--lr", 0.1, "--extra-samples", 2, *SMALL)
    assert (code, stderr) == (2, f"normtweak: config: {name} must be a table of names and values, got 3\n")


def test_what_the_system_refuses_is_one_line_and_exit_code_1(small_model, tmp_path, monkeypatch):
    """A full disk: safetensors has an error of its own."""
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("normtweak.checkpoint.save_file", full)
    code, _, stderr = in_process("quantize", small_model, "--out", tmp_path / "out", *SMALL)
    assert (code, len(stderr.splitlines())) == (1, 1)
    assert stderr.startswith("normtweak: ")
    assert "could not be written: I/O error: No space left on device" in stderr
    assert list(tmp_path.iterdir()) == []


def test_unknown_option():
    assert in_process("quantize", "--nonsense")[0] == 2


def test_ctrl_c_leaves_no_folder(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "float")
    command = [
        sys.executable,
        "-m",
        "normtweak",
        "quantize",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--length",
        "120",
        "--samples",
        "2048",
        "--calibration",
        "random",
    ]
    # A shell's background job ignores Ctrl-C, and so do its children unless they ask for it.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=listen)
    assert process.stdout is not None
    for line in process.stdout:
        if "block 0" in line:
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
