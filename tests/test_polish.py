"""The end-to-end polish: it changes norms alone, brings the packed model nearer to the float one, and leaves alone what it can't better."""

import json

import pytest
import torch

import normtweak
from normtweak import QuantizeConfig, models, pipeline
from normtweak.activations import BlockCalls
from normtweak.config import CalibrationConfig, PolishConfig
from normtweak.norms import norm_parameters
from normtweak.polish import _TOGETHER, POLISH_RATES, _Divergence, _Objective, polish
from normtweak.progress import Silent
from small_models import make_model, tensors_of

CALIBRATION = {"source": "random", "samples": 8, "length": 24, "batch_size": 4}


def run(folder, out, **settings):
    settings = {"bits": 2, "group_size": 32, "symmetric": False, "tweak": None, "calibration": CALIBRATION, "compute_dtype": "float32"} | settings
    return normtweak.quantize(folder, out=out, config=QuantizeConfig.from_dict(settings))


def last_hidden(folder, tokens):
    """What the float model's last block gives."""
    model = models.load(folder)
    blocks, seen = model.get_submodule(models.block_path(model)), []
    handle = blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    handle.remove()
    return seen[0], logits


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neox", "opt", "bloom"])
def test_norms_alone_change_and_the_model_comes_nearer(tmp_path, model_type):
    folder = make_model(tmp_path / "float", model_type)
    coarse = {"method": "rtn", "clip_steps": 0, "calibration": CALIBRATION | {"samples": 24}}
    report = run(folder, tmp_path / "polished", polish={"learning_rate": 1e-2, "iterations": 4}, **coarse)
    run(folder, tmp_path / "plain", **coarse)
    assert report.polish.accepted
    assert report.polish.kl_after < report.polish.kl_before
    polished, plain = tensors_of(tmp_path / "polished"), tensors_of(tmp_path / "plain")
    assert polished.keys() == plain.keys()
    changed = {name for name in plain if not torch.equal(polished[name].float(), plain[name].float())}
    skeleton = models.load(folder)
    norms = {parameter.name for parameter in norm_parameters(skeleton, relative=True)}
    assert changed
    assert all(any(name.endswith(norm) or norm.endswith(name) for norm in norms) for name in changed)
    assert any(".layers." not in name and ".h." not in name for name in changed)  # the last norm is among them
    recipe = json.loads((tmp_path / "polished" / "normtweak.json").read_text())
    assert recipe["polish"]["kl_after"] == report.polish.kl_after
    tokens = torch.randint(2, 90, (16, 24))
    with torch.no_grad():
        exact = models.load(folder)(tokens).logits.log_softmax(-1)
        near, far = (
            torch.nn.functional.kl_div(normtweak.load(tmp_path / name)(tokens).logits.log_softmax(-1), exact, log_target=True, reduction="sum")
            for name in ("polished", "plain")
        )
    assert near < far


def test_what_follows_the_blocks_is_the_float_models(tmp_path):
    folder = make_model(tmp_path / "float", "gemma2")
    tokens = torch.randint(2, 90, (2, 12))
    hidden, logits = last_hidden(folder, tokens)
    model = models.load(folder)
    calls = BlockCalls(model, model.get_submodule(models.block_path(model)))
    calls.embed(tokens)
    start = {p.name: p.start for p in norm_parameters(model, relative=True)}
    with torch.no_grad():
        for parameter in norm_parameters(model, relative=True):
            model.get_parameter(parameter.name).add_(0.3)
        torch.testing.assert_close(calls.logits(tokens, hidden, start), logits)


@pytest.mark.parametrize(("bytes_kept", "again"), [(0, 2), (1, 1), (2**30, 0)])
def test_gradients_are_those_of_the_plain_computation(small_model, monkeypatch, bytes_kept, again):
    """Whatever is kept for the backward pass; the blocks behind it are computed twice."""
    monkeypatch.setattr("normtweak.polish.KEPT", bytes_kept)
    tokens = torch.randint(2, 90, (2, 12))
    hidden, exact = last_hidden(small_model, tokens)
    model = models.load(small_model)
    blocks = model.get_submodule(models.block_path(model))
    parameters = norm_parameters(model, relative=True)
    start = {p.name: p.start for p in parameters}
    model.requires_grad_(False)
    own = [model.get_parameter(p.name).requires_grad_() for p in parameters]
    with torch.no_grad():
        for parameter in own:
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    objective = _Objective(model, blocks, tokens, hidden, start, torch.float32)
    runs = []
    handles = [block.mlp.register_forward_pre_hook(lambda *_: runs.append(1)) for block in blocks]
    found = torch.autograd.grad(objective(torch.arange(2)), own)
    assert len(blocks) == 2
    assert len(runs) == 2 + again
    for handle in handles:
        handle.remove()
    log_p, log_q = exact.log_softmax(-1), model(input_ids=tokens).logits.log_softmax(-1)
    plain = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(-1).mean(), own)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_float_model_against_itself_is_left_as_it_is(small_model):
    tokens = torch.randint(2, 90, (8, 16))
    hidden, _ = last_hidden(small_model, tokens)
    model = models.load(small_model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    blocks = model.get_submodule(models.block_path(model))
    report, values = polish(model, blocks, tokens, hidden, PolishConfig(), dtype=torch.float32, progress=Silent())
    assert not report.accepted
    assert report.kl_after == report.kl_before
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in values.items())


def test_what_held_out_text_does_not_confirm_is_not_written(small_model, tmp_path):
    report = run(small_model, tmp_path / "wild", polish={"learning_rate": 0.9})
    run(small_model, tmp_path / "plain")
    assert not report.polish.accepted
    wild, plain = tensors_of(tmp_path / "wild"), tensors_of(tmp_path / "plain")
    assert all(torch.equal(wild[name], plain[name]) for name in plain)


def test_without_a_learning_rate_one_is_found(small_model, tmp_path):
    coarse = {"method": "rtn", "clip_steps": 0, "calibration": CALIBRATION | {"samples": 24}}
    found = run(small_model, tmp_path / "found", polish={"learning_rate": None}, **coarse).polish
    assert found.rate in POLISH_RATES
    given = run(small_model, tmp_path / "given", polish={"learning_rate": found.rate}, **coarse).polish
    assert (found.kl_before, found.kl_after) == (given.kl_before, given.kl_after)


def test_no_gradient_is_computed_where_none_is_wanted():
    logits = torch.randn(1, 100, 50, requires_grad=True)
    divergence = _Divergence.apply(logits, torch.randn(1, 100, 50))
    assert divergence.grad_fn.saved_tensors[0].shape == logits.shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", None)
        torch.testing.assert_close(_Divergence.apply(logits.detach(), logits), torch.tensor(0.0))


def test_divergence_and_its_gradient_are_the_formulas(monkeypatch):
    monkeypatch.setitem(_TOGETHER, False, 5 * 70 + 1)  # 33 tokens, 5 at a time
    generator = torch.Generator().manual_seed(0)
    target = 5 * torch.randn(3, 11, 70, generator=generator)
    # near to it, far from it, and so far that the likeliest token's probability is no float32
    for distance in (1e-3, 3.0, 300.0):
        logits = (target + distance * torch.randn(3, 11, 70, generator=generator)).requires_grad_()
        found = _Divergence.apply(logits, target)
        exact = logits.detach().double().requires_grad_()
        p, q = target.double().log_softmax(-1), exact.log_softmax(-1)
        expected = (p.exp() * (p - q)).sum(-1).mean()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-7)
        (own,), (other,) = torch.autograd.grad(3 * found, logits), torch.autograd.grad(3 * expected, exact)
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-7)


def test_two_runs_with_one_seed_write_the_same_bytes(small_model, tmp_path):
    for name in ("a", "b"):
        run(small_model, tmp_path / name, polish={}, tweak={})
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_one_sequence_is_refused_before_any_work(small_model, tmp_path):
    with pytest.raises(ValueError, match="quantize: polish must be given two sequences or more, as one is held out, got 1"):
        run(small_model, tmp_path / "out", polish={}, calibration=CALIBRATION | {"samples": 1})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("learning_rate", 0.0), ("iterations", 0), ("batch_size", 0), ("held_out", 0.0), ("min_gain", 1.0), ("extra_samples", -1)]
)
def test_settings_are_checked(key, value):
    with pytest.raises(ValueError, match=f"PolishConfig: {key} must be"):
        PolishConfig(**{key: value})


def test_extra_sequences_are_for_the_polish_alone(small_model, tmp_path, monkeypatch):
    tokens = torch.randint(2, 90, (11, 24), generator=torch.Generator().manual_seed(3))
    own, extra = tokens[:6], tokens[6:]
    seen = []

    def spy(model, blocks, given, hidden, *args, **kwargs):
        seen.append((given, hidden))
        return polish(model, blocks, given, hidden, *args, **kwargs)

    monkeypatch.setattr(pipeline, "polish", spy)
    config = {"bits": 2, "group_size": 32, "symmetric": False, "compute_dtype": "float32", "calibration": {"batch_size": 4}, "tweak": {}}
    config = QuantizeConfig.from_dict(config | {"polish": {"min_gain": 0.0}})
    normtweak.quantize(small_model, out=tmp_path / "extra", config=config, tokens=own, extra_tokens=extra)
    normtweak.quantize(small_model, out=tmp_path / "own", config=config, tokens=own)
    (given, hidden), (less, _) = seen
    assert torch.equal(given, tokens)
    assert torch.equal(less, own)
    torch.testing.assert_close(hidden, last_hidden(small_model, tokens)[0], rtol=1e-4, atol=1e-4)
    with_extra, without = tensors_of(tmp_path / "extra"), tensors_of(tmp_path / "own")
    assert all(torch.equal(with_extra[name], without[name]) for name in with_extra if "norm" not in name)
    assert any(not torch.equal(with_extra[name], without[name]) for name in with_extra)


def test_extra_sequences_are_of_the_calibrations_own_text(small_model, tmp_path, monkeypatch):
    seen = []

    def spy(model, blocks, given, *args, **kwargs):
        seen.append(given)
        return polish(model, blocks, given, *args, **kwargs)

    monkeypatch.setattr(pipeline, "polish", spy)
    run(small_model, tmp_path / "a", polish={"extra_samples": 5})
    run(small_model, tmp_path / "b", polish={"extra_samples": 0}, calibration=CALIBRATION | {"samples": 13})
    assert torch.equal(*seen)


@pytest.mark.parametrize(("samples", "held_out"), [(8, 1), (64, 8), (200, 16)])
def test_an_eighth_is_held_out_up_to_sixteen_sequences(small_model, tmp_path, monkeypatch, samples, held_out):
    seen, mean = set(), _Objective.mean
    monkeypatch.setattr(_Objective, "mean", lambda self, rows: seen.add((len(rows), int(rows[-1]))) or mean(self, rows))
    run(small_model, tmp_path / "out", calibration=CALIBRATION | {"samples": samples, "length": 8}, polish={})
    assert seen == {(held_out, samples - 1)}


def test_extra_tokens_are_checked(small_model, tmp_path):
    tokens = torch.ones(2, 24, dtype=torch.int64)
    for extra, wanted in ((tokens[:, :8], "of the tokens' length 24, got 8"), (tokens.float(), "int64"), (tokens + 5000, "int64")):
        with pytest.raises(ValueError, match=f"quantize: extra_tokens must be {wanted}"):
            normtweak.quantize(small_model, out=tmp_path / "out", tokens=tokens, extra_tokens=extra)
    assert not (tmp_path / "out").exists()


def test_presets():
    assert QuantizeConfig.preset("default").polish == PolishConfig()
    assert QuantizeConfig.preset("default", tweak=None).polish is None
    assert QuantizeConfig.preset("default", polish=None).polish is None
    coarse = QuantizeConfig.preset("default", bits=2, calibration=CalibrationConfig(samples=10)).polish
    assert (coarse.learning_rate, coarse.extra_samples) == (1e-2, 40)
    assert QuantizeConfig.preset("default", bits=2).polish.extra_samples == 256
    assert QuantizeConfig.preset("default", bits=2, polish={"extra_samples": 0}).polish == PolishConfig(learning_rate=1e-2)
    assert QuantizeConfig.preset("paper").polish is None


def test_a_tweak_that_leads_away_from_the_float_model_is_undone(small_model, tmp_path):
    ruinous = {"learning_rate": 0.5, "reject_worse": False, "schedule": "constant"}
    tiny = {"learning_rate": 1e-9}
    report = run(small_model, tmp_path / "undone", method="rtn", bits=4, tweak=ruinous, polish=tiny)
    assert report.polish.undone
    assert "the layer-wise tweak undone" in str(report.polish)
    stored, exact = tensors_of(tmp_path / "undone"), tensors_of(small_model)
    for name, value in exact.items():
        if "layernorm" in name:
            torch.testing.assert_close(stored[name].float(), value.float(), rtol=1e-5, atol=1e-5)
    gains = {"learning_rate": 2e-3, "iterations": 4}
    kept = run(small_model, tmp_path / "kept", method="rtn", bits=2, tweak=gains, polish=tiny | {"min_gain": 0.0})
    assert not kept.polish.undone


def test_where_no_block_kept_its_tweak_none_was_undone(small_model, tmp_path):
    report = run(small_model, tmp_path / "out", method="rtn", bits=4, tweak={"learning_rate": 0.9}, polish={"min_gain": 0.9})
    assert [block.rate for block in report.blocks] == [0, 0]
    assert not report.polish.undone


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients(small_model, tmp_path, off):
    with off():
        report = run(small_model, tmp_path / "out", method="rtn", bits=2, tweak={}, polish={})
        again = normtweak.tweak(tmp_path / "out", float_model=small_model, out=tmp_path / "again", tokens=torch.randint(2, 90, (4, 16)))
    assert report.polish.kl_before > 0
    assert again.polish.kl_before > 0


def test_a_gain_that_is_too_small_is_none(small_model, tmp_path):
    """The tweak gains some on held-out text, the polish nothing: less than is asked, so the norms are the quantizer's again."""
    plain = run(small_model, tmp_path / "plain", method="rtn", bits=2)
    gains = {"method": "rtn", "bits": 2, "tweak": {"learning_rate": 2e-3, "iterations": 4}}
    report = run(small_model, tmp_path / "out", polish={"learning_rate": 1e-9, "min_gain": 0.9}, **gains)
    assert report.polish.undone
    assert not report.polish.accepted
    assert not report.norms_moved
    assert not plain.norms_moved
    written, before = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    assert all(torch.equal(written[name].to(value.dtype), value) for name, value in before.items())
    kept = run(small_model, tmp_path / "kept", polish={"learning_rate": 1e-9, "min_gain": 0.0}, **gains)
    assert kept.norms_moved
