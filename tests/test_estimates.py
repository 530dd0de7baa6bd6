import math

import pytest
import torch

from normtweak.estimates import Difference, Estimate, Metric, exponential_mean, mean, paired_difference


def test_mean_and_its_error():
    assert mean(torch.tensor([1.0, 2.0, 3.0, 4.0])) == Estimate(2.5, pytest.approx(math.sqrt(5 / 3) / 2))
    assert mean(torch.tensor([3.0])) == Estimate(3.0, None)
    flips = (torch.rand(1000) < 0.3).double()
    assert mean(flips).standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 1000), rel=0.1)


def test_perplexity_by_the_delta_method():
    values = torch.rand(50) + 2
    inside, outside = mean(values), exponential_mean(values)
    assert outside.value == pytest.approx(math.exp(inside.value))
    assert outside.standard_error == pytest.approx(outside.value * inside.standard_error)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.71), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (39, 2.023), (1999, 1.961)])
def test_the_interval_is_students(freedom, quantile):
    n = freedom + 1
    values = torch.randn(n, dtype=torch.float64)
    low, high = paired_difference(values, torch.zeros(n)).interval
    assert (high - low) / 2 == pytest.approx(quantile * values.std().item() / math.sqrt(n), rel=3e-3)


@pytest.mark.parametrize("n", [6, 40])
def test_the_interval_covers_the_truth_19_times_in_20(n):
    hard = torch.randn(2000, n, dtype=torch.float64) * 10
    ours, theirs = hard + torch.randn(2000, n) + 0.5, hard + torch.randn(2000, n)
    inside = [low <= 0.5 <= high for low, high in (paired_difference(a, b).interval for a, b in zip(ours, theirs, strict=True))]
    assert sum(inside) / 2000 == pytest.approx(0.95, abs=0.015)


def test_a_difference_of_logarithms_is_a_ratio():
    ratio = Difference(math.log(2), (0.0, math.log(4))).exponential()
    assert (ratio.value, *ratio.interval) == pytest.approx((2, 1, 4))
    assert Difference(0.0, None).exponential() == Difference(1.0, None)
    ours, theirs = (Metric.of("t", "perplexity", torch.tensor([2.0, 4.0]) + shift, exponential=True) for shift in (0.0, math.log(3)))
    assert theirs.against(ours).value == pytest.approx(3)
    assert str(Estimate(0.51234, 0.0123)) == "0.5123 ± 0.012"
    assert str(Difference(0.1, (-0.2, 0.4))) == "0.1 [-0.2, 0.4]"
