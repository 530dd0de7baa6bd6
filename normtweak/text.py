"""Text from a loaded model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from .checks import check_ids
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
    """Continue a prompt by transformers' generate, greedily or by sampling. Raises ValueError for a prompt that is empty, has no tokens, or leaves too few of the model's positions."""
    check_prompt(prompt)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    config, count = model.config.get_text_config(), inputs.input_ids.shape[1]
    require(count > 0, "generate", "prompt", "text that the tokenizer has tokens for", repr(prompt))
    check_ids("generate", int(inputs.input_ids.max()), config.vocab_size)
    limit = getattr(config, "max_position_embeddings", None)
    wanted = f"at most the model's {limit} positions"
    require(limit is None or count + max_new_tokens <= limit, "generate", "prompt with max_new_tokens", wanted, f"{count} + {max_new_tokens}")
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling)
    new = output[0, count:]
    return Continuation(tokenizer.decode(new, skip_special_tokens=True), len(new), time.perf_counter() - began)
