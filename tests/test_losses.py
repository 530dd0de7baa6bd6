import pytest
import torch

from normtweak import losses

NAMES = ["channel", "channel_squared", "mse", "token_mse", "kl"]


@pytest.mark.parametrize("name", NAMES)
def test_zero_at_the_target_and_positive_elsewhere(name):
    target = torch.randn(2, 5, 8)
    mask = torch.ones(2, 5, dtype=torch.bool)
    loss = losses.find(name)
    assert loss(target.clone(), target, mask).item() == pytest.approx(0, abs=1e-6)
    assert loss(target + torch.randn(2, 5, 8), target, mask).item() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens_do_not_count(name):
    target = torch.randn(2, 5, 8)
    output = target + 0.1 * torch.randn(2, 5, 8)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 0] = False
    spoilt = output.clone()
    spoilt[:, 0] = 1e4
    assert losses.find(name)(output, target, mask).item() == losses.find(name)(spoilt, target, mask).item()
    assert losses.find(name)(output[:, 1:], target[:, 1:], mask[:, 1:]).item() == pytest.approx(
        losses.find(name)(output, target, mask).item(), rel=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_descending_the_gradient_lowers_the_loss(name):
    target = torch.randn(2, 16, 8)
    mask = torch.ones(2, 16, dtype=torch.bool)
    output = (target * 1.2 + 0.1).requires_grad_()
    loss = losses.find(name)(output, target, mask)
    loss.backward()
    assert torch.isfinite(output.grad).all()
    step = 0.01 * loss.item() / output.grad.square().sum()
    assert losses.find(name)(output.detach() - step * output.grad, target, mask) < loss


def test_token_mse_weighs_tokens_alike():
    target = torch.randn(1, 4, 8)
    scaled = target * torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 4, 1)
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss = losses.find("token_mse")
    assert loss(target * 1.1, target, mask).item() == pytest.approx(loss(scaled * 1.1, scaled, mask).item(), rel=1e-4)


def test_unknown_name():
    with pytest.raises(ValueError, match="losses: name must be one of channel, .*, got l1"):
        losses.find("l1")
