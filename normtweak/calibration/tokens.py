"""Random token ids: the control that calibration text is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import CalibrationConfig
from . import with_bos


def random(config: CalibrationConfig, tokenizer: Any, vocabulary: int, seed: int) -> Tensor:
    """Uniform ids int64 [samples, length], special tokens left out."""
    special = set(tokenizer.all_special_ids)
    allowed = torch.tensor([i for i in range(vocabulary) if i not in special])
    picks = torch.randint(len(allowed), (config.samples, config.length), generator=torch.Generator().manual_seed(seed))
    return with_bos(allowed[picks], tokenizer)
