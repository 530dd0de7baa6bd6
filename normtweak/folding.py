"""Scales that move from what makes a block's channels, a norm or a linear, into the linears that read them: the block's function stays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .families import Family
from .norms import gain_offset


@dataclass(frozen=True)
class Fold:
    """A place where a scale s > 0 per channel can move: source / s, and each reader's weight * s by input channel.

    source: a norm, whose gain (offset included) and bias are divided, or an nn.Linear, whose rows and bias are. readers: by path in the model, every module
    that reads the channels; each has a weight [out, channels].
    """

    source: nn.Module
    readers: Mapping[str, nn.Module]

    @property
    def channels(self) -> int:
        """How many there are."""
        return self.source.get_parameter("weight").shape[0]

    @torch.no_grad()
    def apply(self, scale: Tensor) -> None:
        """Move the scale [channels], in place."""
        weight = self.source.get_parameter("weight")
        if weight.dim() == 1:
            offset = gain_offset(self.source)
            weight.copy_((weight + offset) / scale - offset)
        else:
            weight.div_(scale[:, None])
        bias = getattr(self.source, "bias", None)
        if bias is not None:
            bias.div_(scale)
        for reader in self.readers.values():
            reader.get_parameter("weight").mul_(scale)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What `apply` changes."""
        yield from self.source.parameters(recurse=False)
        for reader in self.readers.values():
            yield reader.get_parameter("weight")


def folds_of(block: nn.Module, place: str, family: Family | None) -> list[Fold]:
    """Where scales can move in a block, as its family's data say; nowhere in a family that the table doesn't know.

    place: the block's path in the model, with a dot behind it.
    """
    if family is None:
        return []
    paths = [path for path, _ in block.named_modules()]
    pairs = [(source, readers) for source, readers in family.feeds(paths).items() if readers]
    pairs += [(source, (reader,)) for source, reader in family.followers(paths)]
    found = []
    for source, readers in pairs:
        fold = Fold(block.get_submodule(source), {place + reader: block.get_submodule(reader) for reader in readers})
        # Grouped queries: a value channel is read by several heads, at other places.
        if all(reader.get_parameter("weight").shape[1] == fold.channels for reader in fold.readers.values()):
            found.append(fold)
    return found


@contextmanager
def applied(folds: Iterable[Fold], scales: Iterable[Tensor]) -> Iterator[None]:
    """The scales are moved while open; afterwards every parameter is what it was, to the bit."""
    folds = list(folds)
    touched = {id(parameter): parameter for fold in folds for parameter in fold.parameters()}
    before = [parameter.detach().clone() for parameter in touched.values()]
    try:
        for fold, scale in zip(folds, scales, strict=True):
            fold.apply(scale)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(touched.values(), before, strict=True):
                parameter.copy_(value)


def floored(values: Tensor) -> Tensor:
    """Magnitudes of channels, none below a ten-thousandth of the largest: a channel that hardly ever speaks shall not push the others' scales to extremes."""
    return values.clamp(min=max(1e-4 * values.max().item(), torch.finfo(torch.float32).tiny))


def balanced(scale: Tensor) -> Tensor:
    """A scale with geometric mean 1: a factor that all channels share does nothing but take precision from what is stored in 16 bits."""
    return scale / scale.log().mean().exp()
