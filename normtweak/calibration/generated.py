"""Text that the model writes itself (LLM-QAT, arXiv 2305.17888, section 3.1; first token restricted as in Norm Tweaking, section 3.3).

Where the model ends its text before the sequence is full, a fresh first token follows in the end's place and a new text begins: no sequence holds padding or an
end-of-text token.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attention import decoding
from ..config import CalibrationConfig
from ..progress import Advance, Progress
from . import Author, Calibration, first_tokens, kept, leading_bos
from .first_tokens import FirstTokens
from .kept import Draft
from .quality import TextReport

# Sequences that share a decoding step: as fast as 64 (measured on 2 cores), with half the memory for keys and values.
GENERATION_BATCH = 32
# Part of a draft's key: raise it when the same settings write other text.
_VERSION = 1


def prepare(config: CalibrationConfig, author: Author, seed: int) -> Callable[[Progress], Calibration]:
    """What gives the generated text when called; taken from the cache, or begun there, when the same was generated before. Raises ValueError as `first_tokens.find` does."""
    choice = first_tokens.find(config, author.tokenizer, author.vocabulary, author.model_type)

    def write(progress: Progress) -> Calibration:
        path = kept.path_of(_key(config, choice, author.identity(), seed)) if config.cache else None
        draft = kept.read(path, config.samples, config.length) if path else None
        done = 0 if draft is None else len(draft.tokens)
        seconds = 0.0
        if draft is None or done < config.samples:
            model, began = author.load(), time.perf_counter()
            draft = continue_draft(
                model, author.tokenizer, config, choice, seed, progress, draft, lambda new: kept.write(path, new) if path else None
            )
            seconds = time.perf_counter() - began
        speed = (config.samples - done) * config.length / seconds if seconds else 0.0
        report = TextReport.of("generated", draft.tokens, author.tokenizer, ends=draft.ends, tokens_per_second=speed)
        return Calibration(draft.tokens, report)

    return write


def _key(config: CalibrationConfig, choice: FirstTokens, identity: str, seed: int) -> str:
    settings = [_VERSION, identity, torch.__version__, GENERATION_BATCH, config.samples, config.length, config.greedy_tokens, choice.digest(), seed]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def generate(model: Any, tokenizer: Any, config: CalibrationConfig, seed: int, progress: Progress) -> Tensor:
    """Token ids int64 [samples, length]: a random first token, `greedy_tokens` likeliest ones, then samples at temperature 1.

    After an end of text a fresh first token follows in its place, so every sequence is whole and none holds padding or a special token
    (but a leading BOS, where the tokenizer puts one). One KV cache for all sequences of a batch; the result depends on the seed alone.
    """
    choice = first_tokens.find(config, tokenizer, _vocabulary(model), model.config.model_type)
    return continue_draft(model, tokenizer, config, choice, seed, progress).tokens


def _vocabulary(model: Any) -> int:
    return model.get_output_embeddings().weight.shape[0]


@torch.inference_mode()
def continue_draft(
    model: Any,
    tokenizer: Any,
    config: CalibrationConfig,
    choice: FirstTokens,
    seed: int,
    progress: Progress,
    draft: Draft | None = None,
    keep: Callable[[Draft], None] = lambda draft: None,
) -> Draft:
    """The whole draft: what one with fewer sequences (of the same settings and seed) lacks is generated, batch by batch, and `keep` is called after each."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    if draft is None:
        empty = torch.empty(0, config.length, dtype=torch.int64)
        draft = Draft(empty, empty.bool(), generator.get_state())
    generator.set_state(draft.state)
    writer = _Writer(model, tokenizer, choice, config.greedy_tokens, generator)
    bos = leading_bos(tokenizer)
    batches = [len(batch) for batch in torch.empty(config.samples).split(GENERATION_BATCH)][len(draft.tokens) // GENERATION_BATCH :]
    steps = config.length - (1 if bos is None else 2)
    with decoding(model), progress.task("generating calibration text", len(batches) * steps) as advance:
        for count in batches:
            first = choice.draw(count, generator)
            if bos is not None:
                first = torch.cat([torch.full_like(first, bos), first], 1)
            tokens, begins = writer.write(first, config.length, advance)
            draft = draft.plus(tokens.cpu(), begins.cpu(), generator.get_state())
            keep(draft)
    return draft


class _Writer:
    """Continues a batch of first tokens."""

    def __init__(self, model: Any, tokenizer: Any, choice: FirstTokens, greedy_tokens: int, generator: torch.Generator) -> None:
        self._model, self._choice, self._greedy_tokens, self._generator = model, choice, greedy_tokens, generator
        eos = model.generation_config.eos_token_id
        ends = {eos} if isinstance(eos, int) else set(eos or ())
        banned = sorted(i for i in set(tokenizer.all_special_ids) - ends if i < _vocabulary(model))
        self._banned = torch.tensor(banned, dtype=torch.int64, device=model.device)
        self._ends = torch.tensor(sorted(ends), dtype=torch.int64, device=model.device)

    def write(self, first: Tensor, length: int, advance: Advance) -> tuple[Tensor, Tensor]:
        """Ids [B, length] that begin with `first` [B, 1 or 2], and which of them begin a text."""
        ids, step, cache = first, first, None
        begins = torch.zeros_like(first, dtype=torch.bool)
        begins[:, -1] = True
        age = torch.zeros_like(first[:, :1])  # tokens since the last first token
        while ids.shape[1] < length:
            out = self._model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            logits[:, self._banned] = -torch.inf
            step = torch.where(age < self._greedy_tokens, logits.argmax(-1, keepdim=True), sample(logits, self._generator))
            ended = torch.isin(step, self._ends)
            step = torch.where(ended, self._choice.draw(len(step), self._generator), step)
            age = torch.where(ended, 0, age + 1)
            ids, begins = torch.cat([ids, step], 1), torch.cat([begins, ended], 1)
            advance()
        return ids, begins


def sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One draw [B, 1] from softmax(logits [B, V]) by inverting the cumulative sum: one random number a row, where torch.multinomial draws V."""
    cumulative = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum_(-1)
    total = cumulative[:, -1:]
    at = torch.rand(total.shape, generator=generator, device=total.device) * total
    # strictly below the total, and the first entry strictly above the draw: a token of probability zero is never it
    return torch.searchsorted(cumulative, at.minimum(torch.nextafter(total, torch.zeros_like(total))), right=True)
