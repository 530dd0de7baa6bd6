"""What calibration text is worth: how much of it is unusable, and how fast it was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A sequence is repetitive when more than half of its 4-grams have been in it before: far beyond what people write (seq-rep-4 below 0.01 in WikiText-103) and
# above greedy decoding's mean (over 0.4), where loops are the rule: Welleck et al., "Neural Text Generation with Unlikelihood Training", arXiv 1908.04319.
NGRAM, REPETITIVE = 4, 0.5
# A sequence is unreadable when more than this share of its characters are bytes of no character; those at its ends, where a character may be cut, don't count.
UNREADABLE = 0.01


@dataclass(frozen=True)
class TextReport:
    """What is known of calibration text.

    Unusable sequences are `repetitive` (more than half of the 4-grams occurred in the sequence before: seq-rep-4 above 0.5), hold `special` tokens (other than
    a leading BOS, or what a chat template puts), or are `unreadable` (over 1 % of the characters are U+FFFD); `unusable` is their share, each counted once.
    They stay in the text.
    ends: ends of text that the model wrote, each replaced by the first token of a new text; tokens_per_second: of those generated in this run, 0 when all
    came from the cache. Both are None for text that wasn't generated.
    """

    source: str
    sequences: int
    length: int
    repetitive: int
    special: int
    unreadable: int
    unusable: float
    ends: int | None = None
    tokens_per_second: float | None = None

    @classmethod
    def of(
        cls, source: str, ids: Tensor, tokenizer: Any, *, templated: bool = False, ends: int | None = None, tokens_per_second: float | None = None
    ) -> TextReport:
        """For token ids int64 [samples, length]. templated: special tokens are a chat template's."""
        repetitive = repetition(ids) > REPETITIVE
        special = torch.zeros_like(repetitive)
        if not templated:
            special = torch.isin(ids[:, 1:], torch.tensor(tokenizer.all_special_ids, dtype=torch.int64)).any(1)
            leading = [i for i in tokenizer.all_special_ids if i != tokenizer.bos_token_id]
            special |= torch.isin(ids[:, 0], torch.tensor(leading, dtype=torch.int64))
        unreadable = torch.tensor([_unreadable(text) for text in tokenizer.batch_decode(ids.tolist())])
        share = (repetitive | special | unreadable).double().mean().item()
        counts = int(repetitive.sum()), int(special.sum()), int(unreadable.sum())
        return cls(source, len(ids), ids.shape[1], *counts, share, ends, tokens_per_second)

    def __str__(self) -> str:
        speed = ""
        if self.tokens_per_second is not None:
            speed = f", generated at {self.tokens_per_second:.0f} tokens/s" if self.tokens_per_second else ", from the cache"
        ends = "" if self.ends is None else f"; {self.ends} ends of text replaced"
        return (
            f"calibration text ({self.source}): {self.sequences} x {self.length} tokens{speed}; {self.unusable:.1%} of the sequences unusable "
            f"({self.repetitive} repetitive, {self.special} with special tokens, {self.unreadable} unreadable){ends}"
        )


def repetition(ids: Tensor) -> Tensor:
    """Share of each sequence's 4-grams that occurred in it before, seq-rep-4 = 1 - unique / all, float64 [samples], of ids [samples, length of 4 or more]."""
    grams = ids.unfold(1, NGRAM, 1)
    unique = torch.tensor([len(torch.unique(row, dim=0)) for row in grams])
    return 1 - unique.double() / grams.shape[1]


def _unreadable(text: str) -> bool:
    inside = text.strip("\ufffd")
    return inside.count("\ufffd") > UNREADABLE * len(inside) or not inside
