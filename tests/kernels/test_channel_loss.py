import pytest
import torch

from accuracy import assert_accurate
from normtweak_kernels import ChannelStatistics, channel_loss, channel_loss_and_grad
from normtweak_kernels.channel_loss import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["absolute", "squared"]
# Tokens and channels around the blocks of 8 x 256 and the slabs of 256.
SHAPES = [((1,), 5), ((3, 11), 80), ((2, 300), 33), ((65,), 576), ((4, 100), 1100)]
# A gradient of 17 MB in float32, which is written past the caches when its rows are aligned.
LARGE = (4205, 1056)


def inputs(tokens, channels, dtype):
    """Activations with a spread of means, deviations and a massive first token, as language models have."""
    x = torch.randn(*tokens, channels) * torch.logspace(-1, 1, channels) + torch.randn(channels)
    x.view(-1, channels)[0, ::7] += 500
    return x.to(dtype), torch.randn(channels) * 0.1, torch.rand(channels) + 0.5


def run(x, mean_f, var_f, mask, form):
    x = x.detach().requires_grad_()
    loss = channel_loss(x, mean_f, var_f, mask, form=form)
    (3 * loss).backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "channels"), SHAPES)
def test_loss_and_gradient_are_as_exact_as_plain_torch(body, monkeypatch, tokens, channels, dtype, form):
    x, mean_f, var_f = inputs(tokens, channels, dtype)
    mask = torch.rand(tokens) < 0.7
    mask.view(-1)[-1] = True
    for kept in (None, mask):
        loss, grad = run(x, mean_f, var_f, kept, form)
        with monkeypatch.context() as forced:
            forced.setenv("NORMTWEAK_BACKEND", "reference")
            plain_loss, plain_grad = run(x, mean_f, var_f, kept, form)
            exact_loss, exact_grad = run(x.double(), mean_f, var_f, kept, form)
        assert_accurate(loss, plain_loss, exact_loss)
        assert_accurate(grad, plain_grad, exact_grad)
        if kept is not None:
            assert (grad[~kept] == 0).all()


def test_statistics_keep_their_precision_beside_a_massive_token(isa):
    x, mean_f, var_f = inputs((2048,), 64, torch.float32)
    x[:, 1] += 30000
    _, mean, var = torch.ops.normtweak.channel_loss(x, mean_f, var_f, None, False)
    assert torch.allclose(mean.double(), x.double().mean(0), rtol=1e-6, atol=1e-6)
    assert torch.allclose(var.double(), x.double().var(0, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mean", [1e3, -3e4])
@pytest.mark.parametrize("tokens", [1500, 20000])
def test_statistics_keep_a_small_deviation_from_a_large_mean(isa, tokens, mean):
    x = torch.randn(tokens, 37) * 1e-2 + mean
    x[:, 5] += torch.linspace(0, 100, tokens)  # a drift: no early token is near the mean
    _, mean_q, var_q = torch.ops.normtweak.channel_loss(x, torch.zeros(37), torch.zeros(37), None, False)
    exact = x.double()
    assert torch.allclose(mean_q.double(), exact.mean(0), rtol=1e-7, atol=0)
    assert torch.allclose(var_q.double(), exact.var(0, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "channels"), SHAPES)
def test_loss_and_grad_is_what_autograd_gives(body, tokens, channels, dtype, form):
    x, mean_f, var_f = inputs(tokens, channels, dtype)
    mask = torch.rand(tokens) < 0.7
    mask.view(-1)[0] = True
    for kept in (None, mask):
        leaf = x.clone().requires_grad_()
        expected = channel_loss(leaf, mean_f, var_f, kept, form=form)
        expected.backward()
        out = torch.full_like(x, torch.nan)
        loss, grad = channel_loss_and_grad(x, mean_f, var_f, kept, form=form, out=out)
        assert grad is out
        assert not loss.requires_grad
        assert torch.equal(loss, expected)
        assert torch.equal(grad, leaf.grad)
        assert torch.equal(channel_loss_and_grad(x, mean_f, var_f, kept, form=form)[1], grad)


@pytest.mark.parametrize("start", [64, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_gradient_is_written_whole(isa, monkeypatch, dtype, start):
    tokens, channels = LARGE[0] * 4 // dtype.itemsize, LARGE[1]
    x, mean_f, var_f = inputs((tokens,), channels, dtype)
    mask = torch.ones(tokens, dtype=torch.bool)
    mask[::97] = False
    # What lies before and behind the gradient must stay as it is.
    memory = torch.full((start + tokens * channels + 1,), 7.0, dtype=dtype)
    out = memory[start:-1].view(tokens, channels).fill_(torch.nan)
    channel_loss_and_grad(x, mean_f, var_f, mask, out=out)
    monkeypatch.setenv("NORMTWEAK_BACKEND", "reference")
    plain = channel_loss_and_grad(x, mean_f, var_f, mask)[1]
    exact = channel_loss_and_grad(x.double(), mean_f, var_f, mask)[1]
    assert_accurate(out, plain, exact)
    assert (out[~mask] == 0).all()
    assert (memory[:start] == 7).all()
    assert memory[-1] == 7


def test_loss_and_grad_of_non_contiguous_tokens(body):
    x, mean_f, var_f = torch.randn(48, 3, 20).permute(2, 1, 0), torch.randn(48), torch.rand(48)
    mask = (torch.rand(3, 20) < 0.5).t()
    expected = channel_loss_and_grad(x.contiguous(), mean_f, var_f, mask.contiguous())
    for got, wanted in zip(channel_loss_and_grad(x, mean_f, var_f, mask), expected, strict=True):
        assert torch.equal(got, wanted)
        assert got.is_contiguous()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(3, 5), r"out must be torch.float32 \(3, 4\) on cpu, got torch.float32 \(3, 5\) on cpu"),
        (torch.zeros(3, 4).half(), r"out must be torch.float32 \(3, 4\) on cpu, got torch.float16 \(3, 4\) on cpu"),
        (torch.zeros(4, 3).t(), "out must be contiguous without requires_grad"),
        (torch.zeros(3, 4, requires_grad=True), "out must be contiguous without requires_grad"),
    ],
)
def test_out_that_does_not_fit_is_refused(out, message):
    with pytest.raises(ValueError, match=f"channel_loss: {message}"):
        channel_loss_and_grad(torch.zeros(3, 4), torch.zeros(4), torch.ones(4), out=out)


def test_out_that_overlaps_x_is_refused():
    memory = torch.zeros(6, 4)
    with pytest.raises(ValueError, match="out must be memory of its own"):
        channel_loss_and_grad(memory[:3], torch.zeros(4), torch.ones(4), out=memory[1:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_round_as_torch_does(isa, dtype):
    # Offset only: the gradient is `grad` times a known factor in each channel, over the whole range of the format.
    factor = torch.logspace(-30, 20, 501, base=2) * torch.tensor([1.0, -1.0]).repeat(251)[:501]
    x = torch.zeros(2, 501, dtype=dtype)
    zero = torch.zeros(501)
    got = torch.ops.normtweak.channel_loss_backward(torch.tensor(1002.0), x, factor / 2, zero, zero, zero, None, True)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], (factor * torch.tensor(1002.0 / 1002)).to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_in_float64(form):
    x, mean_f, var_f = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True), torch.randn(7), torch.rand(7)
    for mask in (None, torch.tensor([[True] * 5, [True, False, True, False, False]])):
        assert torch.autograd.gradcheck(lambda x, mask=mask: channel_loss(x, mean_f, var_f, mask, form=form), (x,))


def test_a_second_derivative_is_refused(body):
    x = torch.randn(6, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(channel_loss(x, torch.zeros(4), torch.ones(4), form="squared"), x, create_graph=True)
    with pytest.raises(ValueError, match="channel_loss: must be differentiated once"):
        (slope.pow(2) * x).sum().backward()


def test_equal_statistics_cost_nothing(body):
    x = torch.randn(100, 48)
    assert channel_loss(x, x.mean(0), x.var(0, correction=0)) < 1e-6


def test_non_contiguous_inputs(body):
    x, mean_f, var_f = torch.randn(48, 3, 20).permute(2, 1, 0), torch.randn(96)[::2], torch.rand(96)[1::2]
    mask = (torch.rand(3, 20) < 0.5).t()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            run(x, mean_f, var_f, mask, "absolute"),
            run(x.contiguous(), mean_f.contiguous(), var_f.contiguous(), mask.contiguous(), "absolute"),
            strict=True,
        )
    )


def test_result_is_independent_of_threads(isa):
    x, mean_f, var_f = inputs((1500,), 100, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(x, mean_f, var_f, None, "absolute"))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("first", [0, 300, 599])
def test_only_token(body, first):
    x, mask = torch.randn(600, 20), torch.zeros(600, dtype=torch.bool)
    mask[first] = True
    _, mean, var = torch.ops.normtweak.channel_loss(x, torch.zeros(20), torch.zeros(20), mask, False)
    assert torch.equal(mean, x[first])
    assert (var == 0).all()


def test_no_token_gives_nan(body):
    assert torch.isnan(channel_loss(torch.randn(4, 8), torch.zeros(8), torch.ones(8), torch.zeros(4, dtype=torch.bool)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_collected_statistics_are_those_of_all_tokens(body, dtype):
    x, mask = (torch.randn(4, 40, 12) * 5 + 100).to(dtype), torch.rand(4, 40) < 0.5
    mask[2] = False
    statistics = ChannelStatistics()
    for batch, kept in zip(x, mask, strict=True):
        statistics.update(batch, kept)
    tokens = x[mask].double()
    assert statistics.count == len(tokens)
    assert torch.allclose(statistics.mean.double(), tokens.mean(0), rtol=1e-6)
    assert torch.allclose(statistics.var.double(), tokens.var(0, correction=0), rtol=1e-5)
    assert torch.equal(reference.kept_tokens(x, mask), x[mask].float())


def test_the_default_device_changes_nothing(isa):
    x, statistics = torch.randn(9, 12), ChannelStatistics()
    target = torch.zeros(12), torch.ones(12)
    loss, gradient = channel_loss_and_grad(x, *target)
    with torch.device("meta"):
        statistics.update(x)
        again = channel_loss_and_grad(x, *target)
    assert torch.allclose(statistics.mean, x.mean(0), atol=1e-6)
    assert torch.equal(again[0], loss)
    assert torch.equal(again[1], gradient)


def test_collected_statistics_of_the_same_tokens_cost_exactly_nothing(body):
    x, mask = torch.randn(3, 40, 12) * 5 + 100, torch.rand(3, 40) < 0.5
    statistics = ChannelStatistics()
    statistics.update(x, mask)
    _, mean, var = torch.ops.normtweak.channel_loss(x, statistics.mean, statistics.var, mask, False)
    assert torch.equal(statistics.mean, mean)
    assert torch.allclose(statistics.var, var, rtol=1e-6)


def test_statistics_refuse_what_does_not_fit():
    statistics = ChannelStatistics()
    with pytest.raises(ValueError, match="ChannelStatistics: needs at least one token"):
        _ = statistics.mean
    statistics.update(torch.zeros(0, 4))
    assert statistics.count == 0
    statistics.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"ChannelStatistics: x must be \[..., 4\], got \(2, 5\)"):
        statistics.update(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"ChannelStatistics: mask must be bool \(2,\), got torch.bool \(3,\)"):
        statistics.update(torch.zeros(2, 4), torch.ones(3, dtype=torch.bool))


def test_opcheck(body):
    x, mask = torch.randn(3, 5, 8, requires_grad=True), torch.rand(3, 5) < 0.6
    mask[0, 0] = True
    torch.library.opcheck(torch.ops.normtweak.channel_loss.default, (x, torch.zeros(8), torch.ones(8), mask, False))
    constants = (torch.zeros(8), torch.ones(8)) * 2
    torch.library.opcheck(torch.ops.normtweak.channel_loss_backward.default, (torch.tensor(1.0), x.detach(), *constants, mask, True))
    into = (x.detach(), torch.zeros(8), torch.ones(8), mask, False, torch.empty(3, 5, 8))
    torch.library.opcheck(torch.ops.normtweak.channel_loss_and_grad.default, into)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "cubic"}, "form must be absolute or squared, got cubic"),
        ({"x": torch.zeros(3, 4).int()}, r"x must be float16, bfloat16, float32 or float64 \[..., C\], got torch.int32"),
        ({"x": torch.zeros(3, 4).to(torch.float8_e5m2)}, r"x must be float16, bfloat16, float32 or float64 \[..., C\], got torch.float8_e5m2"),
        ({"mean_f": torch.zeros(5)}, r"mean_f must be \[4\], got \(5,\)"),
        ({"var_f": torch.zeros(1, 4)}, r"var_f must be \[4\], got \(1, 4\)"),
        ({"mask": torch.ones(3)}, r"mask must be bool \(3,\), got torch.float32 \(3,\)"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask must be bool \(3,\), got torch.bool \(4,\)"),
        ({"x": torch.zeros(0, 4)}, "x must hold at least one token"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=f"channel_loss: {message}"):
        channel_loss(**{"x": torch.zeros(3, 4), "mean_f": torch.zeros(4), "var_f": torch.ones(4), **arguments})
