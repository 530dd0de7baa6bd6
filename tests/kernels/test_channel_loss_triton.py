"""channel_loss's Triton kernels: interpreted, as compiled PTX in a simulator, and on a GPU where there is one."""

import dataclasses
import importlib

import pytest
import torch

from accuracy import assert_accurate
from normtweak_kernels import ChannelStatistics, channel_loss, channel_loss_and_grad, which_backend
from triton_checks import CAPABILITIES, assert_coalesced, interpreted, only_launched, simulated

OUTPUTS = {
    "channel_partials_fwd_kernel": {"counts_ptr", "roughs_ptr", "corrections_ptr", "m2s_ptr"},
    "channel_statistics_fwd_kernel": {"mean_ptr", "m2_ptr"},
    "channel_loss_fwd_kernel": {"mean_q_ptr", "var_q_ptr", "losses_ptr"},
    "channel_loss_bwd_kernel": {"grad_x_ptr"},
}
FORMS = ["absolute", "squared"]
# Around tiles of 64 tokens and 128 channels; strips are merged for 32 channels at once, the gradient's tiles have 32 tokens and 256 channels.
SHAPES = [((1,), 5), ((3, 11), 80), ((2, 65), 33), ((129,), 260)]


def inputs(tokens, channels, dtype):
    """Activations with a spread of means, deviations and a massive first token, as language models have."""
    x = torch.randn(*tokens, channels) * torch.logspace(-1, 1, channels) + torch.randn(channels)
    x.view(-1, channels)[0, ::7] += 500
    mask = torch.rand(tokens) < 0.7
    mask.view(-1)[-1] = True
    return x.to(dtype), torch.randn(channels) * 0.1, torch.rand(channels) + 0.5, mask


def run(x, mean_f, var_f, mask, form):
    x = x.detach().requires_grad_()
    loss = channel_loss(x, mean_f, var_f, mask, form=form)
    (3 * loss).backward()
    return loss.detach(), x.grad


def check(context, tokens, channels, dtype, form, masked):
    x, mean_f, var_f, mask = inputs(tokens, channels, dtype)
    if not masked:
        mask = None
    else:
        # What the mask leaves out is no input.
        x[~mask] = torch.nan
    # The definition zeroes the gradient of masked tokens by a product, which NaN survives.
    clean = x.nan_to_num(0.0)
    plain, exact = (
        [*run(t, mean_f, var_f, mask, form), channel_loss_and_grad(t, mean_f, var_f, mask, form=form)[1]] for t in (clean, clean.double())
    )
    with context as reports:
        assert which_backend("channel_loss", x, mean_f, var_f, mask, False) == "triton"
        loss, grad = run(x, mean_f, var_f, mask, form)
        again, unit_grad = channel_loss_and_grad(x, mean_f, var_f, mask, form=form)
    assert torch.equal(again, loss)
    for values in zip((loss, grad, unit_grad), plain, exact, strict=True):
        assert_accurate(*values)
    return reports


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "channels"), SHAPES)
def test_interpreted(tokens, channels, dtype, masked, form):
    check(interpreted(), tokens, channels, dtype, form, masked)


@pytest.mark.ptx
@pytest.mark.parametrize(("form", "masked"), [("absolute", True), ("squared", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_simulated(capability, dtype, form, masked):
    check(simulated(capability, OUTPUTS), (3, 23), 75, dtype, form, masked)


@pytest.mark.ptx
@pytest.mark.parametrize("tokens", [(1,), (64,)])
def test_a_single_token_and_whole_tiles(tokens):
    check(simulated(90, OUTPUTS), tokens, 128, torch.float16, "absolute", masked=False)


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_memory_is_asked_for_once(capability, dtype):
    x, mean_f, var_f, mask = inputs((272,), 160, dtype)
    with simulated(capability, OUTPUTS) as reports:
        for kept in (None, mask):
            channel_loss_and_grad(x, mean_f, var_f, kept)
    assert_coalesced(reports)
    # x, and 8 bytes for each channel and tile.
    assert reports[0].bytes_read == x.nbytes
    assert reports[0].bytes_written == 5 * (160 * 12 + 4)
    assert reports[2].bytes_read == x.nbytes + 4 * 160 * 4
    assert reports[2].bytes_written == x.nbytes


@pytest.mark.parametrize("mean", [1e3, -3e4])
def test_statistics_keep_a_small_deviation_from_a_large_mean(mean):
    x = torch.randn(1500, 17) * 1e-2 + mean
    x[:, 5] += torch.linspace(0, 100, 1500)  # a drift: no early token is near the mean
    with interpreted():
        _, mean_q, var_q = torch.ops.normtweak.channel_loss(x, torch.zeros(17), torch.zeros(17), None, False)
    assert torch.allclose(mean_q.double(), x.double().mean(0), rtol=1e-7, atol=0)
    assert torch.allclose(var_q.double(), x.double().var(0, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_strips", [4, 64])
def test_strips_of_several_tiles_and_more_strips_than_are_merged_at_once(monkeypatch, max_strips):
    module = importlib.import_module("normtweak_kernels.channel_loss.triton_kernel")
    small = dataclasses.replace(module.LAUNCH, block_tokens=16, max_strips=max_strips, merge_strips=8)
    monkeypatch.setattr(module, "LAUNCH", small)
    x, mean_f, var_f, mask = inputs((300,), 6, torch.float32)
    x += 1000
    mask[:40] = mask[100:200] = False  # whole tiles without a token, a strip's first ones among them
    with interpreted():
        got = torch.ops.normtweak.channel_loss(x, mean_f, var_f, mask, False)
    kept = x[mask].double()
    assert torch.allclose(got[1].double(), kept.mean(0), rtol=1e-7, atol=0)
    assert torch.allclose(got[2].double(), kept.var(0, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("first", [0, 200, 299])
def test_only_token(first):
    x, mask = torch.randn(300, 20), torch.zeros(300, dtype=torch.bool)
    mask[first] = True
    with interpreted():
        _, mean, var = torch.ops.normtweak.channel_loss(x, torch.zeros(20), torch.zeros(20), mask, False)
    assert torch.equal(mean, x[first])
    assert (var == 0).all()


def test_no_token_gives_nan():
    x, out = torch.randn(4, 8), torch.full((4, 8), torch.nan)
    statistics = ChannelStatistics()
    with interpreted():
        loss, _ = channel_loss_and_grad(x, torch.zeros(8), torch.ones(8), torch.zeros(4, dtype=torch.bool), out=out)
        statistics.update(x, torch.zeros(4, dtype=torch.bool))
    assert loss.isnan()
    assert (out == 0).all()
    assert statistics.count == 0


def test_collected_statistics_of_the_same_tokens_cost_exactly_nothing():
    x, mask = torch.randn(3, 40, 12) * 5 + 100, torch.rand(3, 40) < 0.5
    statistics = ChannelStatistics()
    with interpreted():
        statistics.update(x, mask)
        _, mean, var = torch.ops.normtweak.channel_loss(x, statistics.mean, statistics.var, mask, False)
    tokens = x[mask].double()
    assert statistics.count == len(tokens)
    assert torch.equal(statistics.mean, mean)
    assert torch.equal(statistics.var, var)
    assert torch.allclose(var.double(), tokens.var(0, correction=0), rtol=1e-6)


def test_non_contiguous_inputs():
    x, mean_f, var_f = torch.randn(48, 3, 20).permute(2, 1, 0), torch.randn(96)[::2], torch.rand(96)[1::2]
    mask = (torch.rand(3, 20) < 0.5).t()
    with interpreted():
        got = run(x, mean_f, var_f, mask, "absolute")
        want = run(x.contiguous(), mean_f.contiguous(), var_f.contiguous(), mask.contiguous(), "absolute")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_nothing_waits_for_the_device():
    x, mean_f, var_f, mask = inputs((300,), 80, torch.float32)
    with only_launched() as names:
        channel_loss_and_grad(x, mean_f, var_f, mask)
        run(x, mean_f, var_f, mask, "squared")
        ChannelStatistics().update(x)
    forward = ["channel_partials_fwd_kernel", "channel_loss_fwd_kernel"]
    assert names == [*forward, "channel_loss_bwd_kernel"] * 2 + ["channel_partials_fwd_kernel", "channel_statistics_fwd_kernel"]


def test_opcheck():
    x, mask = torch.randn(3, 5, 8, requires_grad=True), torch.rand(3, 5) < 0.6
    mask[0, 0] = True
    with interpreted():
        torch.library.opcheck(torch.ops.normtweak.channel_loss.default, (x, torch.zeros(8), torch.ones(8), mask, False))
        constants = (torch.zeros(8), torch.ones(8)) * 2
        torch.library.opcheck(torch.ops.normtweak.channel_loss_backward.default, (torch.tensor(1.0), x.detach(), *constants, mask, True))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "channels"), [*SHAPES, ((4, 1024), 576), ((3001,), 4096)])
def test_on_a_gpu(tokens, channels, dtype, masked, form):
    x, mean_f, var_f, mask = (value.cuda() for value in inputs(tokens, channels, dtype))
    mask = mask if masked else None
    assert which_backend("channel_loss", x, mean_f, var_f, mask, False) == "triton"
    loss, grad = run(x, mean_f, var_f, mask, form)
    plain_loss, plain_grad = run(*(None if v is None else v.cpu() for v in (x, mean_f, var_f, mask)), form)
    exact_loss, exact_grad = run(*(None if v is None else v.cpu() for v in (x.double(), mean_f, var_f, mask)), form)
    assert_accurate(loss.cpu(), plain_loss, exact_loss)
    assert_accurate(grad.cpu(), plain_grad, exact_grad)


@pytest.mark.gpu
def test_a_graph_replays_it():
    x, mean_f, var_f, mask = (value.cuda() for value in inputs((300,), 576, torch.bfloat16))
    out = torch.empty_like(x)
    want = [channel_loss_and_grad(value, mean_f, var_f, mask)[1] for value in (x, 2 * x)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        channel_loss_and_grad(x, mean_f, var_f, mask, out=out)
    for expected in want:
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
        x *= 2
