"""The token ids that a run looks at: where they come from, and which of them the polish alone is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from . import calibration, models
from .activations import compute_dtype
from .calibration import Author, Calibration
from .config import PolishConfig, QuantizeConfig, RetweakConfig
from .models import ModelFolder
from .progress import Progress


def calibration_text(folder: ModelFolder, config: QuantizeConfig | RetweakConfig, device: torch.device) -> Callable[[Progress], Calibration]:
    """What gives the text that `config` names for a model, the polish's extra sequences behind the others, when called; on `device` where the model writes it.

    Raises ValueError for whatever is wrong with its source.
    """
    dtype = compute_dtype(config.compute_dtype, device)
    author = Author(
        folder.tokenizer,
        folder.text_config.vocab_size,
        folder.config.model_type,
        load=lambda: models.load(folder.path, dtype=dtype, device=device),
        identity=lambda: f"{folder.digest()} {dtype} {device.type}",
    )
    return calibration.prepare(replace(config.calibration, samples=wanted_sequences(config)), author, config.seed)


def wanted_sequences(config: QuantizeConfig | RetweakConfig, tokens: Tensor | None = None, extra: Tensor | None = None) -> int:
    """How many the calibration text has, the polish's extra ones among them; a user's own tokens count in its stead."""
    if tokens is not None:
        return len(tokens) + (0 if extra is None else len(extra))
    return config.calibration.samples + extra_samples(config.polish)


def extra_samples(polish: PolishConfig | None) -> int:
    """How many of them are for the polish alone."""
    return polish.extra_samples if polish else 0


def split_extra(tokens: Tensor, config: PolishConfig | None) -> tuple[Tensor, Tensor | None]:
    """The sequences that all look at, and those that the polish alone does."""
    extra = extra_samples(config)
    return (tokens[:-extra], tokens[-extra:]) if extra else (tokens, None)


def joined(tokens: Tensor, extra: Tensor | None) -> Tensor:
    """The sequences that the polish looks at; the last ones, which it holds out, are none that the quantizer saw where there are others."""
    return tokens if extra is None else torch.cat([tokens, extra])
