"""Which parameters of a block are a norm's, of whatever norm type, and how a step moves them."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm and their many namesakes: `Norm` in the class's name and a gain of one dimension; BatchNorm isn't one."""
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    return "Norm" in name and "BatchNorm" not in name and isinstance(weight, nn.Parameter) and weight.dim() == 1


@torch.no_grad()
def gain_offset(norm: nn.Module) -> float:
    """What the norm adds to its weight before multiplying: 0, or 1 for the `1 + w` of Gemma's kind.

    Found by asking: with weight (and bias) zero, a norm that multiplies by `w` gives zero, one that multiplies by `1 + w` doesn't.
    """
    probe = copy.deepcopy(norm).float()
    for parameter in probe.parameters():
        parameter.zero_()
    (width,) = norm.get_parameter("weight").shape
    x = torch.linspace(-1.0, 1.0, width, device=next(probe.parameters()).device).unsqueeze(0)
    # some norms take a second tensor, a gate, that multiplies the result
    wanted = [p for p in inspect.signature(probe.forward).parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return 0.0 if probe(*[x] * len(wanted)).abs().max() < 1e-3 else 1.0


@dataclass
class NormParameter:
    """A norm's weight or bias inside a block, and the float32 master that Adam moves.

    relative: gain = gain0 * (1 + delta) for a weight, whose effective gain includes the offset, and bias = bias0 + |gain0| * delta for a bias;
    else the parameter itself is moved.
    """

    name: str
    start: Tensor
    gain: Tensor
    offset: float
    relative: bool
    master: Tensor

    def value(self) -> Tensor:
        """The parameter that the master stands for, float32, differentiable."""
        if not self.relative:
            return self.master
        if self.name.endswith("bias"):
            return self.start + self.gain.abs() * self.master
        return self.gain * (1 + self.master) - self.offset


def norm_parameters(block: nn.Module, *, relative: bool) -> list[NormParameter]:
    """The norm parameters of a block, with masters that require a gradient. Raises ValueError when the block has no norm."""
    found = []
    for path, module in block.named_modules():
        if not is_norm(module):
            continue
        offset = gain_offset(module)
        gain = module.get_parameter("weight").detach().float() + offset
        for leaf, parameter in module.named_parameters(recurse=False):
            start = parameter.detach().float().clone()
            master = (torch.zeros_like(start) if relative else start.clone()).requires_grad_()
            found.append(NormParameter(f"{path}.{leaf}", start, gain, offset, relative, master))
    if not found:
        raise ValueError(f"tweak: the block must hold a LayerNorm or RMSNorm, got {type(block).__name__} without one")
    return found


@torch.no_grad()
def assign(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Write values into a module's parameters of those names, in place."""
    for name, value in values.items():
        module.get_parameter(name).copy_(value)
