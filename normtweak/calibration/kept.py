"""Generated text in the user's cache folder: finished batches survive a killed run, and the next run with the same model, settings and seed goes on behind them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import beside, cache_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draft:
    """Generated sequences so far.

    tokens: int64 [n, length]. begins: bool [n, length], the first token of each text. state: uint8, of the random generator behind the last of them.
    """

    tokens: Tensor
    begins: Tensor
    state: Tensor

    def plus(self, tokens: Tensor, begins: Tensor, state: Tensor) -> Draft:
        """With another batch behind."""
        return Draft(torch.cat([self.tokens, tokens]), torch.cat([self.begins, begins]), state)

    @property
    def ends(self) -> int:
        """Ends of text that were replaced: every text but a sequence's first one stands behind such an end."""
        return int(self.begins.sum()) - len(self.begins)


def path_of(key: str) -> Path:
    """Where the draft with this key is kept."""
    return cache_folder() / "calibration" / f"{key}.safetensors"


def read(path: Path, samples: int, length: int) -> Draft | None:
    """The draft that was kept, None where there is none or (after a warning) it is damaged."""
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        draft = Draft(tensors["tokens"], tensors["begins"], tensors["state"])
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning("calibration text is generated anew: %s is damaged (%s)", path, error)
        return None
    shape = draft.tokens.shape
    if draft.tokens.dim() != 2 or shape[0] > samples or shape[1] != length or draft.begins.shape != shape:
        logger.warning("calibration text is generated anew: %s holds another shape, %s", path, tuple(shape))
        return None
    return draft


def write(path: Path, draft: Draft) -> None:
    """Keep a draft, whole or not at all; where the folder can't be written a warning says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as temporary:
            save_file({"tokens": draft.tokens, "begins": draft.begins, "state": draft.state}, temporary)
    except (OSError, SafetensorError) as error:
        logger.warning("generated calibration text can't be kept in %s (%s)", path.parent, error)
