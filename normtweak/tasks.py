"""Tasks from local JSONL files: the last word of a passage (LAMBADA), and multiple choice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .activations import computing
from .calibration import leading_bos
from .calibration.text import json_lines
from .checks import check_ids
from .config import require
from .estimates import Metric
from .progress import Progress, Silent

# Logits that are held at once, in numbers: 256 MiB in float32.
LOGITS = 2**26


@dataclass(frozen=True)
class Choice:
    """A question: which continuation of its context (or, with one continuation, after which context) is the likeliest. gold: the right one's number."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Passage:
    """A text and the word that ends it."""

    context: str
    word: str


def read_choices(path: Path, limit: int | None = None) -> list[Choice]:
    """The questions of a JSONL file, `limit` of them evenly spaced.

    A line holds `query`, `choices`, `gold` (PIQA, OpenBookQA, COPA), or `ctx`, `endings`, `label` (HellaSwag), or `context_options`,
    `continuation`, `gold` (WinoGrande: the sentence's end is scored behind each option). Behind a query that begins with "Question:"
    comes "Answer:", as the field asks PIQA. Raises ValueError, naming the line, for anything else.
    """
    return _read(path, limit, _choice, "query, choices, gold, or ctx, endings, label, or context_options, continuation, gold")


def read_passages(path: Path, limit: int | None = None) -> list[Passage]:
    """The passages of a JSONL file with `context` and `continuation` in each line, `limit` of them evenly spaced. Raises ValueError, naming the line."""
    return _read(path, limit, _passage, "context, continuation")


def _read(path: Path, limit: int | None, parse: Callable[[dict[str, Any]], Any], wanted: str) -> list[Any]:
    require(path.is_file(), "eval", "task", "a JSONL file", path)
    require(limit is None or limit >= 1, "eval", "limit", "1 or more", limit)
    items = []
    for number, line in json_lines("eval", path):
        try:
            items.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"eval: {path} line {number} must be a JSON object with {wanted}, got {type(error).__name__}: {error}") from None
    require(bool(items), "eval", str(path), "a file with lines", "none")
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _choice(line: dict[str, Any]) -> Choice:
    if "context_options" in line:
        contexts, continuations, gold = line["context_options"], [f" {line['continuation']}"] * len(line["context_options"]), line["gold"]
    else:
        query, choices, gold = (line[key] for key in (("ctx", "endings", "label") if "ctx" in line else ("query", "choices", "gold")))
        query = f"{query.rstrip()}\nAnswer:" if query.startswith("Question:") else query
        if not isinstance(choices, list):
            raise TypeError(f"choices are {type(choices).__name__}")
        contexts, continuations = [query] * len(choices), [f" {choice}" for choice in choices]
    if not (isinstance(gold, int) and 0 <= gold < len(contexts) and len(contexts) > 1):
        raise ValueError(f"the right choice is {gold!r} of {len(contexts)}")
    # what nothing comes before has no likelihood, and what is empty the highest
    for text in (*contexts, *continuations):
        if not text.strip():
            raise ValueError("an empty text")
    return Choice(tuple(contexts), tuple(continuations), gold)


def _passage(line: dict[str, Any]) -> Passage:
    passage = Passage(line["context"].rstrip(), f" {line['continuation'].strip()}")
    if not passage.context or not passage.word.strip():
        raise ValueError("an empty text")
    return passage


def choose(name: str, model: Any, tokenizer: Any, items: list[Choice], *, dtype: torch.dtype, progress: Progress | None = None) -> list[Metric]:
    """Accuracy of a causal model: the choice of the highest log-likelihood, and (where continuations differ) of the highest by character.

    These are what lm-eval calls acc and acc_norm.
    """
    pairs = [pair for item in items for pair in zip(item.contexts, item.continuations, strict=True)]
    likelihoods, _ = log_likelihoods(model, tokenizer, pairs, dtype=dtype, progress=progress)
    sizes = torch.tensor([len(continuation.lstrip()) for _, continuation in pairs])
    right: dict[str, list[bool]] = {"accuracy": [], "accuracy by length": []}
    end = 0
    for item in items:
        own = slice(end, end := end + len(item.contexts))
        right["accuracy"].append(int(likelihoods[own].argmax()) == item.gold)
        right["accuracy by length"].append(int((likelihoods[own] / sizes[own]).argmax()) == item.gold)
    if all(len(set(item.continuations)) == 1 for item in items):
        del right["accuracy by length"]
    return [Metric.of(name, metric, torch.tensor(values).double()) for metric, values in right.items()]


def last_words(name: str, model: Any, tokenizer: Any, items: list[Passage], *, dtype: torch.dtype, progress: Progress | None = None) -> list[Metric]:
    """LAMBADA (arXiv 1606.06031): the share of last words whose every token is the model's first choice, and their perplexity, exp(mean -log p(word))."""
    likelihoods, greedy = log_likelihoods(model, tokenizer, [(item.context, item.word) for item in items], dtype=dtype, progress=progress)
    return [Metric.of(name, "accuracy", greedy.double()), Metric.of(name, "perplexity", -likelihoods, exponential=True)]


@torch.inference_mode()
def log_likelihoods(
    model: Any, tokenizer: Any, pairs: list[tuple[str, str]], *, dtype: torch.dtype, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """log p(continuation | context) float64 [P] of each (context, continuation), and whether each of its tokens is the model's first choice, bool [P].

    The two are tokenized together, behind the tokenizer's BOS where the tokenizer puts one; what is longer than the model's positions loses its beginning.
    dtype: of matrix products.
    """
    bos = leading_bos(tokenizer)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    encoded = [_encode(tokenizer, bos, limit, *pair) for pair in pairs]
    likelihoods, greedy = torch.zeros(len(pairs), dtype=torch.float64), torch.zeros(len(pairs), dtype=torch.bool)
    check_ids("eval", max(max(ids) for ids, _ in encoded), model.config.get_text_config().vocab_size)
    batches = list(_batches([len(ids) for ids, _ in encoded], LOGITS // model.config.get_text_config().vocab_size))
    with (progress or Silent()).task("evaluating", len(batches)) as advance:
        for batch in batches:
            # shorter ones are filled up at the end, which no token before it can see
            width = len(encoded[batch[-1]][0])
            ids = torch.tensor([encoded[i][0] + [0] * (width - len(encoded[i][0])) for i in batch], device=model.device)
            with computing(model.device.type, dtype):
                logits = model(input_ids=ids, use_cache=False).logits
            for row, index in enumerate(batch):
                tokens, count = encoded[index]
                span = slice(len(tokens) - count - 1, len(tokens) - 1)
                own = logits[row, span].float().log_softmax(-1)
                target = ids[row, span.start + 1 : span.stop + 1]
                likelihoods[index] = own.gather(-1, target[:, None]).double().sum()
                greedy[index] = bool((own.argmax(-1) == target).all())
            advance()
    return likelihoods, greedy


def _encode(tokenizer: Any, bos: int | None, limit: int | None, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of both together, and how many at the end are the continuation's."""
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    both = tokenizer(kept + continuation, add_special_tokens=False).input_ids
    start = len(tokenizer(kept, add_special_tokens=False).input_ids)
    # a token that goes across the border is the continuation's; the first token of all is predicted by nothing
    ids = [bos, *both] if bos is not None else both
    count = min(max(1, len(both) - start), len(ids) - 1)
    return ids[-limit:] if limit else ids, min(count, limit - 1) if limit else count


def _batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of like length, shortest first, each of at most `budget` tokens when filled up (or of one sequence)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    yield batch
