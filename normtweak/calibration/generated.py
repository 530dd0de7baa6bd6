"""Text that the model writes itself (LLM-QAT, arXiv 2305.17888, section 3.1; first token restricted as in Norm Tweaking, section 3.3)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ..config import CalibrationConfig, require
from ..progress import Progress
from . import leading_bos

# A capitalised word, with or without the mark of a leading space: how a sentence begins.
_FIRST_WORD = re.compile(r"[ \u0120\u2581]?[A-Z][a-z]+")


def first_tokens(tokenizer: Any) -> Tensor:
    """Ids int64 of the tokens that a generated text may begin with: those whose text is a capitalised word.

    Raises ValueError when the vocabulary has none.
    """
    size = len(tokenizer)
    special = set(tokenizer.all_special_ids)
    words = tokenizer.convert_ids_to_tokens(list(range(size)))
    ids = [i for i, word in enumerate(words) if word and i not in special and _FIRST_WORD.fullmatch(word)]
    require(bool(ids), "calibration", "the tokenizer", "one with capitalised words to begin a text with (or use a text file)", "none")
    return torch.tensor(ids)


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, config: CalibrationConfig, seed: int, progress: Progress) -> Tensor:
    """Token ids int64 [samples, length]: a random first token, `greedy_tokens` likeliest ones, then samples at temperature 1.

    Special tokens (the end of text too) are never drawn, so every sequence is whole and none holds padding. One KV cache
    for all sequences of a batch; the result depends on the seed, not on what else uses torch's generator.
    """
    model.set_attn_implementation("eager")
    generator = torch.Generator(device=model.device).manual_seed(seed)
    allowed = first_tokens(tokenizer)
    first = allowed[torch.randint(len(allowed), (config.samples, 1), generator=generator)]
    bos = leading_bos(tokenizer)
    if bos is not None:
        first = torch.cat([torch.full_like(first, bos), first], 1)
    eos = model.generation_config.eos_token_id
    ends = torch.tensor([eos] if isinstance(eos, int) else list(eos or []), dtype=torch.int64)
    banned = torch.tensor(sorted(set(tokenizer.all_special_ids) - set(ends.tolist())))
    sequences = []
    batches = first.split(GENERATION_BATCH)
    with progress.task("generating calibration text", len(batches) * (config.length - first.shape[1])) as advance:
        for batch in batches:
            ids, cache, step = batch.to(model.device), None, batch.to(model.device)
            age = torch.zeros(len(batch), 1, dtype=torch.int64)
            while ids.shape[1] < config.length:
                out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                logits = out.logits[:, -1].float()
                logits[:, banned] = -torch.inf
                step = torch.where(age < config.greedy_tokens, logits.argmax(-1, keepdim=True), sample(logits, generator))
                ended = torch.isin(step, ends)
                fresh = allowed[torch.randint(len(allowed), step.shape, generator=generator)]
                age = torch.where(ended, -1, age) + 1
                step = torch.where(ended, fresh, step)
                ids = torch.cat([ids, step], 1)
                advance()
            sequences.append(ids.cpu())
    return torch.cat(sequences)


def sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One draw [B, 1] from softmax(logits [B, V]) by inverting the cumulative sum: one random number a row, where torch.multinomial draws V."""
    cumulative = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum_(-1)
    total = cumulative[:, -1:]
    at = torch.rand(total.shape, generator=generator, device=total.device) * total
    # strictly below the total, and the first entry strictly above the draw: a token of probability zero is never it
    return torch.searchsorted(cumulative, at.minimum(torch.nextafter(total, torch.zeros_like(total))), right=True)


# Sequences that share a decoding step: wide enough that the weights are read once for many tokens.
GENERATION_BATCH = 64
