"""The main job on the embedded SmolLM2-135M: what it must reach. Text: the Python language reference, every 8th of 40 windows of 512 tokens."""

import os
import re
import subprocess
import sys

import pytest

import normtweak
from normtweak import CalibrationConfig, QuantizeConfig, evaluate, models
from normtweak.activations import compute_dtype
from normtweak.calibration import generated
from normtweak.progress import Silent

pytestmark = [pytest.mark.slow, pytest.mark.model]

W4 = {"bits": 4, "group_size": -1, "symmetric": True}
W2 = {"bits": 2, "group_size": 64, "symmetric": False}


@pytest.fixture(scope="module")
def folder(embedded_model):
    return models.ModelFolder(embedded_model)


@pytest.fixture(scope="module")
def windows(folder):
    return evaluate.text_windows(folder.tokenizer, evaluate.read_text(evaluate.PYTHON_DOCS), 40, 512)[::8]


@pytest.fixture(scope="module")
def tokens(folder):
    """32 x 256 to calibrate on, 16 x 256 held out."""
    model = models.load(folder.path, dtype=compute_dtype("auto"))
    return generated.generate(model, folder.tokenizer, CalibrationConfig(samples=48, length=256), 0, Silent()).split([32, 16])


@pytest.fixture(scope="module")
def quantized(folder, tokens, tmp_path_factory):
    done = {}

    def run(name, scheme, **settings):
        if name not in done:
            out = tmp_path_factory.mktemp("embedded") / name
            config = QuantizeConfig.preset("default", **scheme, **settings)
            report = normtweak.quantize(folder.path, out=out, config=config, tokens=tokens[0] if config.needs_calibration else None)
            done[name] = normtweak.load(out), report
        return done[name]

    return run


def perplexity(model, folder, windows):
    return evaluate.score(model, folder.tokenizer, windows, dtype=compute_dtype("auto")).perplexity


def test_float(folder, windows):
    assert perplexity(models.load(folder.path), folder, windows) == pytest.approx(11.54, rel=0.005)


def test_rtn_w4(quantized, folder, windows):
    assert perplexity(quantized("rtn4", W4, method="rtn", tweak=None)[0], folder, windows) == pytest.approx(22.0, rel=0.03)


def test_gptq_w4(quantized, folder, windows):
    assert perplexity(quantized("w4", W4, tweak=None)[0], folder, windows) < 17


def test_peak_memory(tmp_path):
    """In a process of its own: what an earlier run left with the allocator would hide what this one takes."""
    command = [sys.executable, "-m", "normtweak", "quantize", models.EMBEDDED, "--out", str(tmp_path / "out")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "500"}).stdout
    assert float(re.search(r"peak memory ([\d.]+) GB", output).group(1)) < 1.6


def test_gptq_w2(quantized, folder, windows):
    assert perplexity(quantized("w2", W2, tweak=None)[0], folder, windows) < 185


@pytest.mark.parametrize(("scheme", "name"), [(W4, "w4"), (W2, "w2")])
def test_the_tweak_brings_the_model_nearer_to_the_float_one(quantized, folder, tokens, scheme, name):
    reference = models.load(folder.path)
    plain, _ = quantized(name, scheme, tweak=None)
    tweaked, _ = quantized(name + " tweaked", scheme)
    kl = [evaluate.score(m, folder.tokenizer, tokens[1], against=reference, dtype=compute_dtype("auto")).kl for m in (plain, tweaked)]
    # at 4 bits there is little left to gain, and a difference within 3 % is undecided by one seed
    assert kl[1] < kl[0] * (1.0 if scheme is W2 else 1.03)


def test_two_runs_write_the_same_bytes(folder, tmp_path):
    config = QuantizeConfig.preset("default", **W4, calibration={"samples": 4, "length": 64})
    for name in ("a", "b"):
        normtweak.quantize(folder.path, out=tmp_path / name, config=config)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) == 31
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_it_generates_text(quantized, folder):
    from normtweak.text import continue_text

    model, _ = quantized("w4", W4, tweak=None)
    first, second = (continue_text(model, folder.tokenizer, "The capital of France is", 12) for _ in range(2))
    assert first.tokens > 0
    assert first.text.strip()
    assert first.text == second.text
