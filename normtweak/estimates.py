"""What a mean over items is worth: standard errors, and differences between two models over the same items."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error (None where one item alone was seen, or nobody knows)."""

    value: float
    standard_error: float | None

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.standard_error is None else f" ± {self.standard_error:.2g}")


@dataclass(frozen=True)
class Difference:
    """A difference, or a ratio, of two models over the same items, and its 95 % confidence interval (None where one item alone was seen)."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.interval is None else f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]")

    def exponential(self) -> Difference:
        """The ratio that a difference of logarithms stands for."""
        return Difference(_exp(self.value), None if self.interval is None else (_exp(self.interval[0]), _exp(self.interval[1])))


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def mean(values: Tensor) -> Estimate:
    """Mean of items [n] and its standard error s / sqrt(n)."""
    values = values.double()
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None)


def exponential_mean(values: Tensor) -> Estimate:
    """exp(mean) of items [n], a perplexity from negative log-likelihoods; its error is exp(mean) times the mean's (delta method)."""
    inside = mean(values)
    value = _exp(inside.value)
    return Estimate(value, None if inside.standard_error is None else value * inside.standard_error)


def paired_difference(ours: Tensor, theirs: Tensor) -> Difference:
    """Mean of ours - theirs over the same items [n], with Student's 95 % interval: what both models find hard or easy cancels."""
    inside = mean(ours.double() - theirs.double())
    if inside.standard_error is None:
        return Difference(inside.value, None)
    half = _student(len(ours) - 1) * inside.standard_error
    return Difference(inside.value, (inside.value - half, inside.value + half))


_FEW = {1: 12.7062, 2: 4.3027, 3: 3.1824}


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: from 4 degrees of freedom on by Abramowitz and Stegun 26.7.5, within 0.3 %, which for fewer is too small, by a quarter for one."""
    if freedom in _FEW:
        return _FEW[freedom]
    z = 1.959964
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / freedom**power for power, term in enumerate(terms))


@dataclass(frozen=True)
class Metric:
    """One figure of one task. samples: per item [n], its mean the value or (`exponential`) the value's logarithm; None where only the value is known."""

    task: str
    name: str
    value: Estimate
    samples: Tensor | None = None
    exponential: bool = False

    @classmethod
    def of(cls, task: str, name: str, samples: Tensor, *, exponential: bool = False) -> Metric:
        """From the items' values."""
        return cls(task, name, exponential_mean(samples) if exponential else mean(samples), samples, exponential)

    def against(self, other: Metric) -> Difference | None:
        """This model's minus (of perplexities: over) the other's, paired by item; None where that can't be said."""
        if self.samples is None or other.samples is None or len(self.samples) != len(other.samples):
            return None
        difference = paired_difference(self.samples, other.samples)
        return difference.exponential() if self.exponential else difference
