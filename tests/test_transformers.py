"""transformers with packed linears: loading, quantizing on the spot, saving, pushing, generating, compiling."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

import normtweak
from normtweak import NormTweakConfig, PackedLinear
from normtweak.config import ModuleOverride
from small_models import make_model, tensors_of

TOKENS = torch.arange(2, 34).reshape(2, 16)


def packed_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def same(one, other):
    """Equal packed modules, equal logits."""
    assert packed_of(one).keys() == packed_of(other).keys()
    assert packed_of(one)
    assert torch.equal(logits(one), logits(other))
    return True


def pack(folder, out, **settings):
    settings = {"bits": 4, "group_size": 32, "method": "rtn", "tweak": None} | settings
    normtweak.quantize(folder, out=out, config=normtweak.QuantizeConfig(**settings))
    return out


def from_pretrained(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | settings)


@pytest.fixture(scope="module")
def packed(small_model, tmp_path_factory):
    """A packed checkpoint of the small llama, 3 bits and asymmetric."""
    return pack(small_model, tmp_path_factory.mktemp("packed") / "out", bits=3, symmetric=False)


# ---- registration


ORDERS = {
    "ours first": "import normtweak; assert 'transformers' not in sys.modules; from transformers import AutoModelForCausalLM",
    "theirs first": "from transformers.quantizers.auto import AutoHfQuantizer; import normtweak",
}


@pytest.mark.parametrize("order", ORDERS)
def test_importing_normtweak_registers_it(order):
    code = f"import sys; {ORDERS[order]}; from transformers import quantizers; print('normtweak' in quantizers.auto.AUTO_QUANTIZER_MAPPING)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(normtweak.__file__).parents[1]), *sys.path])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.split() == ["True"]


def test_the_hook_leaves_when_it_is_done():
    assert "normtweak" in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
    assert not [finder for finder in sys.meta_path if getattr(finder, "engine", "") == "transformers.quantizers.auto"]


def test_the_hook_waits_for_an_import_that_succeeds(tmp_path, monkeypatch):
    """Ctrl-C while transformers is being imported, and again: folders still load."""
    from normtweak.integrations.hooks import after_import

    (tmp_path / "stand_in_engine.py").write_text("import stand_in_flag\n")
    (tmp_path / "stand_in_ours.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    after_import("stand_in_engine", "stand_in_ours")
    importlib.util.find_spec("stand_in_engine")  # only asked for
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("stand_in_engine")
    assert "stand_in_ours" not in sys.modules
    monkeypatch.setitem(sys.modules, "stand_in_flag", sys)
    importlib.import_module("stand_in_engine")
    assert "stand_in_ours" in sys.modules
    assert not [finder for finder in sys.meta_path if getattr(finder, "engine", "") == "stand_in_engine"]


# ---- loading


@pytest.mark.parametrize("settings", [{}, {"device_map": "auto"}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}, {"dtype": "auto"}])
def test_a_checkpoint_loads_as_normtweak_loads_it(packed, settings):
    model = from_pretrained(packed, **settings)
    assert same(model, normtweak.load(packed, dtype=model.dtype))
    assert {module.scales.dtype for module in packed_of(model).values()} == {torch.float16}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_a_model_without_its_head(tmp_path, model_type):
    """As AutoModel gives it, for embeddings; one linear is packed by a rule of its own."""
    own = ModuleOverride(pattern=r"\.1\..*(v_proj|c_proj)", bits=8, group_size=-1)
    out = pack(make_model(tmp_path / "float", model_type), tmp_path / "out", overrides=(own,))
    base, whole = AutoModel.from_pretrained(out, dtype=torch.float32), from_pretrained(out)
    assert len(packed_of(base)) == len(packed_of(whole)) > 0
    assert torch.equal(base(TOKENS).last_hidden_state, whole(TOKENS, output_hidden_states=True).hidden_states[-1])


def test_skipped_experts_load_too(tmp_path):
    out = pack(make_model(tmp_path / "float", "mixtral"), tmp_path / "out", skip=[r"layers\.0\..*experts\.[12]\."])
    model = from_pretrained(out)
    assert same(model, normtweak.load(out))
    model.save_pretrained(tmp_path / "saved")
    assert same(normtweak.load(tmp_path / "saved"), model)
    assert tensors_of(tmp_path / "saved").keys() == tensors_of(out).keys()


def test_transformers_before_5_20_does_not_say_which_model_it_converts_for(tmp_path, monkeypatch):
    out = pack(make_model(tmp_path / "float", "mixtral"), tmp_path / "out")
    from normtweak.integrations.transformers import NormTweakQuantizer

    of_model = NormTweakQuantizer.update_weight_conversions
    monkeypatch.setattr(NormTweakQuantizer, "update_weight_conversions", lambda self, steps, model: of_model(self, steps))
    assert same(from_pretrained(out), normtweak.load(out))


def test_activations_are_chosen_while_loading(packed):
    model = from_pretrained(packed, quantization_config=NormTweakConfig(activations="int8"))
    assert same(model, normtweak.load(packed, activations="int8"))
    assert not torch.equal(logits(model), logits(normtweak.load(packed)))


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "compressed-tensors"])
def test_other_peoples_checkpoints_stay_with_their_loaders_unless_asked_for(small_model, tmp_path, form):
    out = pack(small_model, tmp_path / "out", format=form)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"].pop("meta", None)  # nothing says who wrote it
    (out / "config.json").write_text(json.dumps(config))
    wanted = "compressed-tensors" if form == "compressed-tensors" else "optimum"
    with pytest.raises(ImportError, match=wanted):
        from_pretrained(out)
    model = from_pretrained(out, quantization_config=NormTweakConfig())
    assert same(model, normtweak.load(out))
    model.save_pretrained(tmp_path / "again")
    assert same(normtweak.load(tmp_path / "again"), model)
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert saved == config["quantization_config"]


def test_blocks_may_be_offloaded_but_not_their_codes(packed, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    settings = {"device_map": places | {"lm_head": "cpu"}, "offload_folder": str(tmp_path)}
    assert same(from_pretrained(packed, **settings), normtweak.load(packed))
    with pytest.raises(ValueError, match="from_pretrained: offload_buffers must be off for packed linears, got on"):
        from_pretrained(packed, offload_buffers=True, **settings)


def test_a_damaged_checkpoint_is_named(packed, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in packed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes() if path.suffix != ".safetensors" else path.read_bytes()[:-64])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        from_pretrained(folder)


# ---- quantizing on the spot


def test_a_float_model_is_quantized_on_the_spot(small_model, packed, caplog):
    model = from_pretrained(small_model, quantization_config=NormTweakConfig(bits=3, group_size=32, symmetric=False))
    assert same(model, normtweak.load(packed))
    assert "rounding to the nearest of 3 bits ruins most models" in caplog.text


def test_the_whole_recipe_on_the_spot(small_model, tmp_path):
    calibration = {"samples": 4, "length": 16}
    settings = {"bits": 2, "group_size": 32, "method": "gptq", "calibration": calibration}
    model = from_pretrained(small_model, quantization_config=NormTweakConfig(**settings))
    normtweak.quantize(small_model, out=tmp_path / "out", config=normtweak.QuantizeConfig.preset(**settings))
    assert same(model, normtweak.load(tmp_path / "out"))
    model.save_pretrained(tmp_path / "saved")
    assert same(from_pretrained(tmp_path / "saved"), model)


def test_settings_are_checked_when_they_are_made(small_model):
    with pytest.raises(ValueError, match="QuantizeConfig: bits must be one of 2, 3, 4, 5, 8, got 6"):
        NormTweakConfig(bits=6)
    with pytest.raises(ValueError, match="QuantizeConfig: key must be one of .*, got grup_size"):
        NormTweakConfig(grup_size=64)
    with pytest.raises(ValueError, match="NormTweakConfig: activations must be one of"):
        NormTweakConfig(activations="int4")
    with pytest.raises(ValueError, match="group_size must be a divisor"):
        from_pretrained(small_model, quantization_config=NormTweakConfig(group_size=48))
    with pytest.raises(ValueError, match="device_map must be one device"):
        from_pretrained(small_model, quantization_config=NormTweakConfig(), device_map={"model": "cpu", "lm_head": "disk"})


def test_settings_survive_their_dictionary():
    config = NormTweakConfig(bits=2, group_size=64, method="gptq", activations="int16")
    again = NormTweakConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.recipe == config.recipe
    assert again.activations == "int16"


# ---- saving


@pytest.mark.parametrize("load", [from_pretrained, normtweak.load])
def test_saving_writes_the_codes_that_were_read(packed, tmp_path, load):
    load(packed).save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    before, after = tensors_of(packed), tensors_of(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].to(after[name].dtype), after[name]) for name in before)
    integers = {name for name, tensor in before.items() if not tensor.is_floating_point()}
    assert {after[name].dtype for name in integers} == {torch.int32}
    config = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (packed, tmp_path / "saved")]
    assert config[0] == config[1]
    assert same(from_pretrained(tmp_path / "saved"), normtweak.load(packed))


def test_pushing_uploads_a_folder_that_loads(packed, tmp_path, monkeypatch):
    from huggingface_hub import HfApi, ModelCard

    uploaded = tmp_path / "hub"
    uploaded.mkdir()

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            with operation.as_file() as file:
                (uploaded / operation.path_in_repo).write_bytes(file.read())

    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: ModelCard("---\n---\nsmall"))
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: type("Url", (), {"repo_id": repo_id, "url": ""})())
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    from_pretrained(packed).push_to_hub("somebody/small")
    assert same(normtweak.load(uploaded), normtweak.load(packed))


# ---- running


def test_pipeline_generates_the_same_text(packed):
    tokenizer = AutoTokenizer.from_pretrained(packed)
    generate = pipeline("text-generation", model=from_pretrained(packed), tokenizer=tokenizer)
    text = generate("Once", max_new_tokens=8, min_new_tokens=8, do_sample=False)[0]["generated_text"]
    ids = normtweak.load(packed).generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert text == "Once" + tokenizer.decode(ids[0, 4:], skip_special_tokens=True)
    assert isinstance(pipeline("text-generation", model=str(packed)).model.model.layers[0].mlp.up_proj, PackedLinear)


def test_a_static_cache_gives_the_same_tokens(packed):
    model = from_pretrained(packed)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    dynamic, static = model.generate(TOKENS, **settings), model.generate(TOKENS, cache_implementation="static", **settings)
    assert torch.equal(dynamic, static)


@torch.no_grad()
def decoded(model, run):
    """Logits of two more tokens behind TOKENS, each from a call of `run` with a static cache that `model` has filled."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    model(TOKENS, past_key_values=cache)
    return torch.cat([run(torch.full((2, 1), token), past_key_values=cache).logits for token in (7, 8)])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_decode_step_compiles_without_a_break(packed, dynamic):
    model = from_pretrained(packed)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(decoded(model, compiled), decoded(model, model), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
