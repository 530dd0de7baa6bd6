"""Text from a loaded model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from .config import require


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt: the text, how many tokens, in how many seconds."""

    text: str
    tokens: int
    seconds: float


def check_prompt(prompt: str) -> None:
    """Raise ValueError for an empty prompt."""
    require(bool(prompt), "generate", "prompt", "some text", "an empty one")


def continue_text(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0) -> Continuation:
    """Continue a prompt by transformers' generate, greedily or by sampling. Raises ValueError for an empty prompt."""
    check_prompt(prompt)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling)
    new = output[0, inputs.input_ids.shape[1] :]
    return Continuation(tokenizer.decode(new, skip_special_tokens=True), len(new), time.perf_counter() - began)
