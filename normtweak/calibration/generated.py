"""Text that the model writes itself (LLM-QAT, arXiv 2305.17888, section 3.1; first token restricted as in Norm Tweaking, section 3.3)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..config import CalibrationConfig, require
from ..progress import Advance, Progress
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

    After an end of text a fresh first token follows in its place, so every sequence is whole and none holds padding or a special token
    (but a leading BOS, where the tokenizer puts one). One KV cache for all sequences of a batch; the result depends on the seed alone.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    writer = _Writer(model, tokenizer, vocabulary, config.greedy_tokens, generator)
    bos = leading_bos(tokenizer)
    lead = 1 if bos is None else 2
    sequences = []
    batches = torch.empty(config.samples).split(GENERATION_BATCH)
    with _attention(model, "eager"), progress.task("generating calibration text", len(batches) * (config.length - lead)) as advance:
        for batch in batches:
            first = writer.first_tokens(len(batch))
            if bos is not None:
                first = torch.cat([torch.full_like(first, bos), first], 1)
            sequences.append(writer.write(first, config.length, advance).cpu())
    return torch.cat(sequences)


class _Writer:
    """Continues a batch of first tokens."""

    def __init__(self, model: Any, tokenizer: Any, vocabulary: int, greedy_tokens: int, generator: torch.Generator) -> None:
        self._model, self._greedy_tokens, self._generator = model, greedy_tokens, generator
        allowed = first_tokens(tokenizer)
        self._allowed = allowed[allowed < vocabulary].to(model.device)
        eos = model.generation_config.eos_token_id
        ends = {eos} if isinstance(eos, int) else set(eos or ())
        banned = sorted(i for i in set(tokenizer.all_special_ids) - ends if i < vocabulary)
        self._banned = torch.tensor(banned, dtype=torch.int64, device=model.device)
        self._ends = torch.tensor(sorted(ends), dtype=torch.int64, device=model.device)

    def first_tokens(self, count: int) -> Tensor:
        """Random first tokens [count, 1]."""
        picks = torch.randint(len(self._allowed), (count, 1), generator=self._generator, device=self._allowed.device)
        return self._allowed[picks]

    def write(self, first: Tensor, length: int, advance: Advance) -> Tensor:
        """Ids [B, length] that begin with `first` [B, 1 or 2]."""
        ids, step, cache = first, first, None
        age = torch.zeros_like(first[:, :1])  # tokens since the last first token
        while ids.shape[1] < length:
            out = self._model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            logits[:, self._banned] = -torch.inf
            step = torch.where(age < self._greedy_tokens, logits.argmax(-1, keepdim=True), sample(logits, self._generator))
            ended = torch.isin(step, self._ends)
            step = torch.where(ended, self.first_tokens(len(step)), step)
            age = torch.where(ended, 0, age + 1)
            ids = torch.cat([ids, step], 1)
            advance()
        return ids


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    """Another attention while open: for one query at a time on a CPU, the fused one takes longer than plain products (measured: 1.6 times)."""
    before = model.config._attn_implementation
    if model.device.type == "cpu":
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One draw [B, 1] from softmax(logits [B, V]) by inverting the cumulative sum: one random number a row, where torch.multinomial draws V."""
    cumulative = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum_(-1)
    total = cumulative[:, -1:]
    at = torch.rand(total.shape, generator=generator, device=total.device) * total
    # strictly below the total, and the first entry strictly above the draw: a token of probability zero is never it
    return torch.searchsorted(cumulative, at.minimum(torch.nextafter(total, torch.zeros_like(total))), right=True)


# Sequences that share a decoding step: as fast as 64 (measured on 2 cores), with half the memory for keys and values.
GENERATION_BATCH = 32
