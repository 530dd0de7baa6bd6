"""What a quantized model lost: perplexity, KL divergence and top-1 agreement with the float model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .activations import computing
from .calibration import leading_bos
from .calibration.text import read_utf8
from .config import require
from .progress import Progress, Silent

# The Python language reference, in every CPython's standard library: text that no calibration set of ours is drawn from.
PYTHON_DOCS = "python-docs"


@dataclass(frozen=True)
class Score:
    """Perplexity exp(mean NLL) of the predicted tokens; against a float model also mean KL(float || model) in nats and the share of equal argmaxes."""

    perplexity: float
    kl: float | None = None
    top1_agreement: float | None = None


def read_text(source: str) -> str:
    """The text of a file, or of the Python language reference for "python-docs". Raises ValueError for a file that is missing or not UTF-8."""
    if source == PYTHON_DOCS:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    path = Path(source)
    require(path.is_file(), "eval", "text", f"a text file or {PYTHON_DOCS}", source)
    return read_utf8("eval", path)


def text_windows(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    """Window i of a text is its tokens [i * (T // count), ...) for `length` tokens, int64 [count, length]; no special tokens.

    The whole text is tokenized once. Raises ValueError when it is too short for windows that don't overlap.
    """
    require(count >= 1 and length >= 2, "eval", "windows, length", "at least 1 and 2", (count, length))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    stride = len(ids) // count
    require(stride >= length, "eval", "text", f"at least windows x length = {count * length} tokens long", f"{len(ids)} tokens")
    return torch.tensor([ids[i * stride : i * stride + length] for i in range(count)])


@torch.inference_mode()
def score(
    model: Any,
    tokenizer: Any,
    windows: Tensor,
    *,
    against: Any = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Score:
    """Score a causal model on windows [count, length], and beside a float model when `against` is given.

    Each window is given on its own, behind the tokenizer's BOS where the tokenizer puts one. dtype: of matrix products.
    """
    bos = leading_bos(tokenizer)
    device = model.device
    nll = divergence = 0.0
    agreed = tokens = 0
    # beside a second model one window at a time, since two sets of logits are held
    batches = windows.split(batch_size if against is None else 1)
    with (progress or Silent()).task("evaluating", len(batches)) as advance:
        for batch in batches:
            batch = batch.to(device)
            given = batch if bos is None else torch.cat([torch.full_like(batch[:, :1], bos), batch], 1)
            start = given.shape[1] - batch.shape[1]
            with computing(device.type, dtype):
                logits = model(input_ids=given, use_cache=False).logits[:, start:-1]
                reference = None if against is None else against(input_ids=given, use_cache=False).logits[:, start:-1]
            targets = batch[:, 1:]
            for index, target in enumerate(targets):
                own = logits[index].float().log_softmax(-1)
                nll += functional.nll_loss(own, target, reduction="sum").item()
                if reference is not None:
                    theirs = reference[index].float().log_softmax(-1)
                    divergence += functional.kl_div(own, theirs, log_target=True, reduction="sum").item()
                    agreed += int((own.argmax(-1) == theirs.argmax(-1)).sum())
            tokens += targets.numel()
            advance()
    perplexity = math.exp(nll / tokens)
    return Score(perplexity) if against is None else Score(perplexity, divergence / tokens, agreed / tokens)
