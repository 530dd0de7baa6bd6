"""`normtweak tweak`: better norms for a packed checkpoint, and nothing else of it touched."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import normtweak
from normtweak import RetweakConfig, retweak
from normtweak.polish import polish
from small_models import edit, make_model, make_packed, scattered, tensors_of

TEXT = {"source": "random", "samples": 8, "length": 24, "batch_size": 4}


def settings(**more):
    given = {
        "tweak": {"learning_rate": 5e-3, "iterations": 2},
        "polish": {"learning_rate": 1e-2, "iterations": 2, "min_gain": 0.0},
        "calibration": TEXT,
    }
    return RetweakConfig.preset(2, compute_dtype="float32", **(given | more))


def divergence(float_folder, packed_folder):
    tokens = torch.randint(2, 90, (8, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        exact, close = (normtweak.load(folder)(tokens).logits.log_softmax(-1) for folder in (float_folder, packed_folder))
    return torch.nn.functional.kl_div(close, exact, log_target=True, reduction="none").sum(-1).mean()


def check_norms_alone_changed(before, after, report):
    old, new = tensors_of(before), tensors_of(after)
    assert old.keys() == new.keys()
    changed = [name for name in old if old[name].dtype != new[name].dtype or not torch.equal(old[name], new[name])]
    assert sorted(changed) == report.changed
    assert changed
    assert all(("norm" in name or "ln_" in name) and new[name].dtype == torch.float32 for name in changed)
    files = {path.relative_to(before) for path in before.rglob("*") if path.is_file() and path.suffix != ".safetensors"}
    for path in files - {path for path in files if path.name in ("README.md", "normtweak.json", "model.safetensors.index.json")}:
        assert (before / path).read_bytes() == (after / path).read_bytes()


@pytest.mark.parametrize(
    ("model_type", "name", "dtype"),
    [
        ("llama", "gptq", torch.float32),
        ("gemma2", "gptq_v2", torch.bfloat16),
        ("opt", "compressed-tensors", torch.float16),
        ("qwen3", "gptq", torch.bfloat16),
        ("gpt2", "gptq", torch.float32),
        ("mixtral", "compressed-tensors", torch.float32),
    ],
)
def test_norms_alone_change_and_the_model_comes_nearer(tmp_path, model_type, name, dtype):
    folder = make_model(tmp_path / "float", model_type, dtype=dtype)
    packed = make_packed(folder, tmp_path / "packed", bits=2, symmetric=name != "gptq_v2", format=name)
    report = normtweak.tweak(packed, float_model=folder, out=tmp_path / "out", config=settings())
    check_norms_alone_changed(packed, tmp_path / "out", report)
    assert len(report.blocks) == 2
    assert all(block.loss_after <= block.loss_before for block in report.blocks)
    assert report.polish.accepted
    assert divergence(folder, tmp_path / "out") < divergence(folder, packed)
    note = json.loads((tmp_path / "out" / "normtweak.json").read_text())
    assert note["config"]["method"] == "rtn"
    assert note["retweak"]["polish"]["kl_after"] == report.polish.kl_after
    assert "normtweak tweak" in (tmp_path / "out" / "README.md").read_text()


def foreign(folder):
    """What a folder would be if another tool had written it: one file, no notes, a card of its own."""
    tensors = tensors_of(folder)
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json", folder / "normtweak.json"]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "README.md").write_text("# theirs\n")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("kept")


def test_another_tools_checkpoint_with_act_order(small_model, tmp_path):
    packed = make_packed(small_model, tmp_path / "packed", bits=3)
    foreign(packed)
    scattered(packed)
    report = normtweak.tweak(packed, float_model=small_model, out=tmp_path / "out", config=settings())
    check_norms_alone_changed(packed, tmp_path / "out", report)
    assert (tmp_path / "out" / "README.md").read_text() == "# theirs\n"
    assert normtweak.load(tmp_path / "out").model.layers[0].mlp.up_proj.perm is not None


@pytest.mark.parametrize("which", ["tweak", "polish"])
def test_one_of_the_two_alone(small_model, tmp_path, which):
    packed = make_packed(small_model, tmp_path / "packed", bits=2)
    other = {"tweak": "polish", "polish": "tweak"}[which]
    report = normtweak.tweak(packed, float_model=small_model, out=tmp_path / "out", config=settings(**{other: None}))
    check_norms_alone_changed(packed, tmp_path / "out", report)
    assert (report.polish is None) == (which == "tweak")
    assert bool(report.blocks) == (which == "tweak")


def test_own_norms_are_where_it_starts_and_the_float_models_its_aim(small_model, tmp_path):
    """A second run goes on from the first one's norms, the last one too, which isn't the float model's any more."""
    packed = make_packed(small_model, tmp_path / "packed", bits=2)
    first = normtweak.tweak(packed, float_model=small_model, out=tmp_path / "first", config=settings())
    assert "model.norm.weight" in first.changed
    second = normtweak.tweak(tmp_path / "first", float_model=small_model, out=tmp_path / "second", config=settings(tweak=None))
    assert second.polish.kl_before == pytest.approx(first.polish.kl_after, rel=1e-3)


def test_an_exact_checkpoint_is_left_alone(small_model, tmp_path):
    """8 bits and steps that are too long: nothing gets better, so nothing changes."""
    packed = make_packed(small_model, tmp_path / "packed", bits=8)
    wild = {"tweak": {"learning_rate": 0.5, "schedule": "constant"}, "polish": {"learning_rate": 0.5}}
    report = normtweak.tweak(packed, float_model=small_model, out=tmp_path / "out", config=settings(**wild))
    assert report.changed == []
    old, new = tensors_of(packed), tensors_of(tmp_path / "out")
    assert all(torch.equal(old[name], new[name]) and old[name].dtype == new[name].dtype for name in old)


def test_extra_sequences_are_for_the_polish_alone(small_model, tmp_path, monkeypatch):
    packed = make_packed(small_model, tmp_path / "packed", bits=2, group_size=32, symmetric=False)
    tokens = torch.randint(2, 90, (11, 24), generator=torch.Generator().manual_seed(3))
    seen = []

    def spy(model, blocks, given, hidden, *args, **kwargs):
        seen.append((given, hidden))
        return polish(model, blocks, given, hidden, *args, **kwargs)

    monkeypatch.setattr(retweak, "polish", spy)
    for count, extra in ((6, tokens[6:]), (6, None)):
        report = normtweak.tweak(
            packed, float_model=small_model, out=tmp_path / f"out{extra is None}", config=settings(), tokens=tokens[:count], extra_tokens=extra
        )
        seen.append([block.loss_after for block in report.blocks])
    (given, hidden), losses, (less, part), losses_without = seen
    assert torch.equal(given, tokens)
    assert torch.equal(less, tokens[:6])
    torch.testing.assert_close(hidden[:6], part)
    assert losses == losses_without


def test_one_block_at_a_time(small_model, tmp_path, monkeypatch):
    from normtweak import blocks

    packed = make_packed(small_model, tmp_path / "packed")
    real, opened = [], blocks.BlockReader.open_block

    def watched(self, index):
        block = opened(self, index)
        real.append([i for i, other in enumerate(self.modules) if any(not t.is_meta for t in [*other.parameters(), *other.buffers()])])
        return block

    monkeypatch.setattr(blocks.BlockReader, "open_block", watched)
    normtweak.tweak(packed, float_model=small_model, out=tmp_path / "out", config=settings(polish=None))
    assert real == [[0], [0], [1], [1]]


def test_what_does_not_belong_together(small_model, tmp_path):
    packed = make_packed(small_model, tmp_path / "packed")
    before = sorted(tmp_path.iterdir())

    def refused(message, quantized=packed, float_model=small_model, **more):
        with pytest.raises(ValueError, match=message) as caught:
            normtweak.tweak(quantized, float_model=float_model, out=tmp_path / "out", config=settings(), **more)
        assert "\n" not in str(caught.value)

    refused("load: .* must be a packed checkpoint, got a float model", quantized=small_model)
    refused("tweak: float must be a float model, got one quantized by gptq", float_model=packed)
    refused("tweak: tokens must be int64", tokens=torch.full((2, 8), 1000))
    refused("tweak: polish must be given two sequences or more, as one is held out, got 1", tokens=torch.ones(1, 8, dtype=torch.int64))
    other = make_model(tmp_path / "other", intermediate_size=128)
    refused(r"tweak: float must be the model that was quantized, with model.layers.0.mlp.gate_proj of \(96, 64\), got \(128, 64\)", float_model=other)
    shutil.rmtree(other)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(ValueError, match="RetweakConfig: tweak, polish must be given, one of them at least, got neither"):
        RetweakConfig(tweak=None, polish=None)
    with pytest.raises(ValueError, match="RetweakConfig: key must be one of tweak, polish"):
        RetweakConfig.preset(4, bits=4)


def test_a_namesake_is_not_the_model(small_model, tmp_path):
    """Of the same shapes, with other weights; rounded ones are the model's own."""
    packed = make_packed(small_model, tmp_path / "packed")
    other = shutil.copytree(small_model, tmp_path / "other")
    for change, same in ((lambda t: t.bfloat16(), True), (lambda t: torch.randn_like(t) * t.std(), False)):
        edit(other, "model.embed_tokens.weight", change)
        if same:
            retweak.tweak(packed, float_model=other, out=tmp_path / "out", config=settings(polish=None))
            continue
        with pytest.raises(
            ValueError, match="tweak: float must be the model that was quantized, with its embedding, got one whose embedding differs by 1"
        ):
            retweak.tweak(packed, float_model=other, out=tmp_path / "none", config=settings())
    assert not (tmp_path / "none").exists()


def test_the_recipe_depends_on_the_bits(small_model, tmp_path):
    coarse, fine = make_packed(small_model, tmp_path / "w2", bits=2), make_packed(small_model, tmp_path / "w4")
    recipe = retweak.preset_for(coarse, calibration={"samples": 10})
    assert (recipe.tweak.learning_rate, recipe.polish.learning_rate, recipe.polish.extra_samples) == (2e-3, 1e-2, 40)
    assert retweak.preset_for(coarse, polish={"extra_samples": 3}).polish.extra_samples == 3
    assert retweak.preset_for(coarse, polish=None).polish is None
    recipe = retweak.preset_for(fine, seed=3)
    assert (recipe.tweak.learning_rate, recipe.polish.learning_rate, recipe.polish.extra_samples) == (3e-4, 5e-3, 0)
