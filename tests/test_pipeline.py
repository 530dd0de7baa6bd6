"""The main job on small models: quantize, tweak, save, load, generate."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import normtweak
from normtweak import QuantizeConfig, models
from normtweak.activations import Passes
from normtweak.linear import PackedLinear
from normtweak_kernels import packing
from small_models import make_model, tensors_of

CALIBRATION = {"source": "random", "samples": 6, "length": 24, "batch_size": 4}


def run(model, out, preset="default", **settings):
    settings.setdefault("calibration", CALIBRATION)
    return normtweak.quantize(model, out=out, config=QuantizeConfig.preset(preset, compute_dtype="float32", **settings))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "symmetric"), [(-1, True), (32, False)])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_quantize_save_load(small_model, tmp_path, bits, group_size, symmetric, method):
    run(small_model, tmp_path / "out", bits=bits, group_size=group_size, symmetric=symmetric, method=method)
    model = normtweak.load(tmp_path / "out")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == 2 * 7
    assert all(module.bits == bits and (module.zeros is None) == symmetric for module in packed.values())
    tokens = torch.randint(2, 90, (2, 16))
    by_hand = dequantized_by_hand(tmp_path / "out", small_model, bits, group_size)
    with torch.no_grad():
        ours, theirs = model(tokens).logits, by_hand(tokens).logits
    assert (ours - theirs).norm() / theirs.norm() < 1e-4
    assert model.generate(tokens, max_new_tokens=4, do_sample=False).shape == (2, 20)


def dequantized_by_hand(folder, float_folder, bits, group_size):
    """The float model with each packed weight replaced by integers read from GPTQ's words one by one."""
    model = models.load(float_folder)
    stored = tensors_of(folder)
    parameters = dict(model.named_parameters())
    v1 = json.loads((folder / "quantize_config.json").read_text())["checkpoint_format"] == "gptq"
    with torch.no_grad():
        for name, tensor in stored.items():
            if name in parameters:
                parameters[name].copy_(tensor.float())
        for name in [n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")]:
            weight = parameters[f"{name}.weight"]
            n, k = weight.shape
            words = stored[f"{name}.qweight"].t().tolist()
            zero_words = stored[f"{name}.qzeros"].tolist()
            scales = stored[f"{name}.scales"].float()
            for row in range(n):
                stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words[row]))
                for column in range(k):
                    group = 0 if group_size == -1 else column // group_size
                    zeros = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(zero_words[group]))
                    code = (stream >> (bits * column)) % 2**bits
                    zero = ((zeros >> (bits * row)) + v1) % 2**bits
                    weight[row, column] = (code - zero) * scales[group, row]
    return model


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gemma", {}),
        ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 16}),
        ("qwen3", {}),
        ("opt", {}),
        ("gpt_neox", {}),
        ("mistral", {"sliding_window": 16}),
        ("phi", {}),
    ],
)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_other_families(tmp_path, model_type, settings, preset):
    folder = make_model(tmp_path / "float", model_type, dtype=torch.bfloat16, **settings)
    report = run(folder, tmp_path / "out", preset, bits=4, group_size=32, tweak={"reject_worse": False}, polish=None)
    assert len(report.blocks) == 2
    stored, before = tensors_of(tmp_path / "out"), tensors_of(folder)
    norms = [name for name in before if "norm" in name and name in stored]
    assert norms
    inside = [name for name in norms if ".0." in name or ".1." in name]
    assert all(stored[name].dtype == torch.float32 for name in inside)
    assert any(not torch.equal(stored[name], before[name].float()) for name in inside)
    model = normtweak.load(tmp_path / "out")
    tokens = torch.randint(2, 90, (2, 12))
    with torch.no_grad():
        close = model(tokens).logits.log_softmax(-1)
        exact = models.load(folder)(tokens).logits.log_softmax(-1)
    assert torch.nn.functional.kl_div(close, exact, log_target=True, reduction="none").sum(-1).mean() < 1.0
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 15)


def test_the_tweak_lowers_its_loss_and_changes_norms_alone(small_model, tmp_path):
    tweak = {"learning_rate": 5e-3, "iterations": 4}
    report = run(small_model, tmp_path / "with", bits=2, group_size=32, symmetric=False, tweak=tweak)
    run(small_model, tmp_path / "without", bits=2, group_size=32, symmetric=False, tweak=None)
    for block in report.blocks:
        assert block.loss_after < block.loss_before
    tweaked, plain = tensors_of(tmp_path / "with"), tensors_of(tmp_path / "without")
    assert tweaked.keys() == plain.keys()
    first = {name for name in plain if ".layers.0." in name or ".layers." not in name}
    changed = {name for name in first if not torch.equal(tweaked[name], plain[name])}
    assert changed
    assert all("norm" in name for name in changed)


def test_two_runs_with_one_seed_write_the_same_bytes(small_model, tmp_path):
    settings = {"bits": 3, "group_size": 32, "calibration": {"source": "generated", "samples": 4, "length": 16}}
    for name in ("a", "b"):
        run(small_model, tmp_path / name, **settings)
    run(small_model, tmp_path / "c", seed=1, **settings)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) == 3
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert any((tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes() for name in files)


def test_the_folder_holds_what_others_need(small_model, tmp_path):
    run(small_model, tmp_path / "out", bits=2, group_size=32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config["quantization_config"]
    assert {
        "quant_method": "gptq",
        "bits": 2,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }.items() <= quantization.items()
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == quantization
    recipe = json.loads((tmp_path / "out" / "normtweak.json").read_text())
    assert QuantizeConfig.from_dict(recipe["config"]).bits == 2
    assert set(recipe["packages"]) >= {"normtweak", "torch", "transformers"}
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    stored = tensors_of(tmp_path / "out")
    prefix = "model.layers.0.mlp.down_proj."
    assert stored[prefix + "qweight"].shape == (96 * 2 // 32, 64)
    assert stored[prefix + "qzeros"].shape == (3, 64 * 2 // 32)
    assert (stored[prefix + "qzeros"] == 0x55555555).all()
    assert stored[prefix + "scales"].dtype == torch.float16
    assert torch.equal(stored[prefix + "g_idx"], torch.arange(96, dtype=torch.int32) // 32)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored)
    assert "lm_head.weight" not in stored  # tied


def test_transformers_loads_it_after_the_import(small_model, tmp_path):
    import transformers

    run(small_model, tmp_path / "out", bits=4, group_size=32, symmetric=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.randint(2, 90, (2, 16))
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, normtweak.load(tmp_path / "out")(tokens).logits)


def test_one_block_at_a_time(small_model, tmp_path, monkeypatch):
    """A block's weights are read when its turn comes and its shard is written before the next block is read."""
    from normtweak import pipeline

    events = []
    open_block, write = pipeline._Plan.open_block, pipeline.CheckpointWriter.write

    def opened(self, index):
        real = [i for i, block in enumerate(self.modules) if any(not t.is_meta for t in [*block.parameters(), *block.buffers()])]
        events.append(("open", index, real))
        return open_block(self, index)

    def written(self, number, tensors):
        events.append(("write", number))
        return write(self, number, tensors)

    monkeypatch.setattr(pipeline._Plan, "open_block", opened)
    monkeypatch.setattr(pipeline.CheckpointWriter, "write", written)
    run(small_model, tmp_path / "out", polish=None)
    assert events == [("open", 0, []), ("write", 0), ("open", 1, []), ("write", 1), ("write", 2)]


def test_a_tweak_that_makes_it_worse_is_undone(small_model, tmp_path):
    settings = {"bits": 8, "group_size": 32, "calibration": CALIBRATION, "polish": None}
    tweak = {"learning_rate": 0.5, "schedule": "constant"}
    report = run(small_model, tmp_path / "kept", tweak=tweak, **settings)
    assert all(block.loss_after == block.loss_before for block in report.blocks)
    before, after = tensors_of(small_model), tensors_of(tmp_path / "kept")
    assert all(torch.equal(after[name].float(), before[name]) for name in after if "layers" in name and "norm" in name)
    worse = run(small_model, tmp_path / "worse", tweak=tweak | {"reject_worse": False}, **settings)
    assert all(block.loss_after > block.loss_before for block in worse.blocks)


def test_without_a_learning_rate_each_block_finds_its_own(small_model, tmp_path):
    settings = {"bits": 2, "group_size": 32, "symmetric": False, "polish": None, "calibration": CALIBRATION | {"samples": 16}}
    found = run(small_model, tmp_path / "found", tweak={"learning_rate": None}, **settings)
    rates = QuantizeConfig.preset(tweak={"learning_rate": None}).tweak.learning_rates()
    assert all(block.rate in (0, *rates) for block in found.blocks)
    assert any(block.rate > rates[0] for block in found.blocks)
    # the first block is given the same stream whatever the rate
    losses = [run(small_model, tmp_path / f"{rate}", tweak={"learning_rate": rate}, **settings).blocks[0].loss_after for rate in rates]
    assert found.blocks[0].loss_after == min(losses)


def test_a_finished_checkpoint_survives_a_failing_rename(small_model, tmp_path, monkeypatch, caplog):
    from pathlib import Path

    def fails(self, target):
        raise OSError("busy") if self.name == ".out.partial" else None

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: fails(self, target) if self.is_dir() else rename(self, target))
    with pytest.raises(OSError, match="busy"):
        run(small_model, tmp_path / "out", method="rtn", tweak=None)
    assert "it is kept as" in caplog.text
    assert len(list((tmp_path / ".out.partial").glob("*.safetensors"))) == 3


def test_out_may_be_a_link(small_model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run(small_model, tmp_path / "link", method="rtn", tweak=None)
    assert (tmp_path / "real" / "config.json").is_file()


def test_own_tokens(small_model, tmp_path):
    tokens = torch.randint(2, 90, (4, 20))
    normtweak.quantize(small_model, out=tmp_path / "out", config=QuantizeConfig(tweak=None), tokens=tokens)
    assert json.loads((tmp_path / "out" / "normtweak.json").read_text())["calibration_tokens"] == 80
    with pytest.raises(ValueError, match="quantize: tokens must be int64"):
        normtweak.quantize(small_model, out=tmp_path / "no", tokens=tokens + 1000)


# wrong input: one clear line, nothing written


def refuse(model, out, message, **settings):
    before = sorted(out.parent.iterdir())
    with pytest.raises(ValueError, match=message) as caught:
        run(model, out, **settings)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before


def test_group_size_that_does_not_divide(small_model, tmp_path):
    refuse(small_model, tmp_path / "out", r"group_size must be a divisor of model.layers.0.*'s 64 input features, got 48", group_size=48)


def test_out_that_is_not_empty(small_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    refuse(small_model, tmp_path / "out", "out must be a new or empty folder")
    (tmp_path / "out" / "file").unlink()
    run(small_model, tmp_path / "out", tweak=None, method="rtn")  # an empty one is fine


def test_out_under_a_missing_parent(small_model, tmp_path):
    with pytest.raises(ValueError, match="out must be in a folder that exists"):
        run(small_model, tmp_path / "no" / "out")


def test_too_little_disk(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refuse(small_model, tmp_path / "out", "out must be on a disk with .* MiB free, got 0 MiB free")


def test_truncated_weights(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "float")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refuse(folder, tmp_path / "out", "model.safetensors must be a whole safetensors file, got one that is damaged or truncated")


def test_weights_that_are_no_safetensors(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "float")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, tmp_path / "out", r"must be a folder with safetensors weights .found pytorch_model.bin; .*, got none")
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(b"hello world, this is text")
    refuse(folder, tmp_path / "out", "must be a whole safetensors file")


def test_a_missing_parameter_and_a_wrong_shape(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "float")
    tensors = load_file(folder / "model.safetensors")
    norm = tensors.pop("model.layers.1.input_layernorm.weight")
    save_file(tensors, folder / "model.safetensors")
    refuse(folder, tmp_path / "out", "a checkpoint with the parameter .*model.layers.1.input_layernorm.weight.*, got none")
    save_file(tensors | {"model.layers.1.input_layernorm.weight": norm[:-1].clone()}, folder / "model.safetensors")
    refuse(folder, tmp_path / "out", r"model.layers.1.input_layernorm.weight must be of shape \(64,\), got \(63,\)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_are_named(small_model, tmp_path, value):
    folder = shutil.copytree(small_model, tmp_path / "float")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    refuse(folder, tmp_path / "out", "model.layers.1.mlp.up_proj.weight must be finite, got NaN or infinity")


def test_calibration_text_too_short(small_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("too short")
    calibration = CALIBRATION | {"source": str(text)}
    refuse(small_model, tmp_path / "out", r"text.txt must be at least samples x length = 144 tokens long, got 9 tokens", calibration=calibration)
    refuse(
        small_model, tmp_path / "out", "source must be generated, random or a text file, got nowhere", calibration=CALIBRATION | {"source": "nowhere"}
    )


@pytest.mark.parametrize(
    ("file", "message"),
    [("tokenizer.json", "must have a tokenizer, got"), ("generation_config.json", "must have a generation_config.json that transformers knows, got")],
)
def test_what_is_written_at_the_end_is_read_at_the_beginning(small_model, tmp_path, monkeypatch, file, message):
    folder = shutil.copytree(small_model, tmp_path / "float")
    (folder / file).write_text("{")
    monkeypatch.setattr("normtweak.pipeline.CheckpointWriter", None)
    refuse(folder, tmp_path / "out", message, method="rtn", tweak=None)


def test_a_model_in_float64(tmp_path):
    run(make_model(tmp_path / "float", dtype=torch.float64), tmp_path / "out", method="rtn", tweak=None)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.float16, torch.int32}


def test_a_packed_model_is_not_quantized_again(small_model, tmp_path):
    run(small_model, tmp_path / "once", method="rtn", tweak=None)
    refuse(tmp_path / "once", tmp_path / "twice", "model must be a float model, got one quantized by gptq")


def test_a_model_without_blocks(tmp_path):
    folder = make_model(tmp_path / "float")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, tmp_path / "out", "model must be one with at least one block, got none")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(small_model, tmp_path, monkeypatch, error):
    from normtweak import loop

    through = loop.tweak_block

    def fails_at_1(block, index, *args):
        if index == 1:
            raise error
        return through(block, index, *args)

    monkeypatch.setattr(loop, "tweak_block", fails_at_1)
    with pytest.raises(error):
        run(small_model, tmp_path / "out", tweak={})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_is_begun_anew(small_model, tmp_path, caplog):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00001-of-00003.safetensors").write_text("half")
    run(small_model, tmp_path / "out", method="rtn", tweak=None)
    assert "removing 1 files that an interrupted run left" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_to_one_folder(small_model, tmp_path):
    from normtweak.checkpoint import CheckpointWriter

    with CheckpointWriter(tmp_path / "out", 1), pytest.raises(ValueError, match="no other run is writing"):
        run(small_model, tmp_path / "out", method="rtn", tweak=None)


def test_packed_shapes_are_as_announced(small_model, tmp_path):
    """The size that is checked against the disk is the size that is written."""
    plan_size = None
    from normtweak import pipeline

    class Plan(pipeline._Plan):
        def check_disk(self, out):
            nonlocal plan_size
            plan_size = self.packed_size()

    original, pipeline._Plan = pipeline._Plan, Plan
    try:
        report = run(small_model, tmp_path / "out", bits=3, group_size=32, method="rtn", tweak=None)
    finally:
        pipeline._Plan = original
    headers = sum(int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in (tmp_path / "out").glob("*.safetensors"))
    assert report.packed_size - headers == pytest.approx(plan_size, rel=0.02)
    assert packing.packed_shape(64, 96, 3) == (4, 9, 16)


@pytest.mark.parametrize(("model_type", "settings"), [("llama", {}), ("mixtral", {"num_local_experts": 4}), ("opt", {})])
def test_passes_that_end_at_the_last_linear_that_is_wanted_find_the_same_codes(model_type, settings, tmp_path, monkeypatch):
    model, until, ends = make_model(tmp_path / "float", model_type, **settings), Passes.until, []
    monkeypatch.setattr(Passes, "until", lambda self, modules: ends.append(len(modules)) or until(self, modules))
    run(model, tmp_path / "short", group_size=32, tweak=None)
    assert ends
    monkeypatch.setattr(Passes, "until", lambda self, modules: self())
    run(model, tmp_path / "whole", group_size=32, tweak=None)
    short, whole = tensors_of(tmp_path / "short"), tensors_of(tmp_path / "whole")
    assert short.keys() == whole.keys()
    assert all(torch.equal(short[name], whole[name]) for name in short)
