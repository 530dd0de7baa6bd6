"""Which tokens a generated text may begin with: capitalised words, any token, or words of given languages in given proportions."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CalibrationConfig, parse_shares, require
from .languages import LANGUAGES, PRESETS, Language
from .text import read_utf8

# A capitalised word, with or without the mark of a leading space: how a sentence begins.
_FIRST_WORD = re.compile(r"[ \u0120\u2581]?[A-Z][a-z]+")


@dataclass(frozen=True)
class FirstTokens:
    """Token ids int64 [T], and the cumulative probability up to each, float64 [T]; None where all are as likely."""

    ids: Tensor
    cumulative: Tensor | None = None

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Ids [count, 1]. By cumulative probability the draw is systematic, in random order: whatever is a run of ids with probability p is drawn within one of p * count times."""
        device = generator.device
        if self.cumulative is None:
            return self.ids.to(device)[torch.randint(len(self.ids), (count, 1), generator=generator, device=device)]
        points = torch.arange(count, device=device) + torch.rand((), generator=generator, device=device, dtype=torch.float64)
        picks = torch.searchsorted(self.cumulative.to(device), points / count, right=True).clamp(max=len(self.ids) - 1)
        return self.ids.to(device)[picks[torch.randperm(count, generator=generator, device=device)]].unsqueeze(1)

    def digest(self) -> str:
        """Changes with the tokens and their probabilities."""
        cumulative = b"" if self.cumulative is None else self.cumulative.numpy().tobytes()
        return hashlib.sha256(self.ids.numpy().tobytes() + b"|" + cumulative).hexdigest()


def find(config: CalibrationConfig, tokenizer: Any, vocabulary: int, model_type: str) -> FirstTokens:
    """What `config.languages` means for a tokenizer; ids below `vocabulary`, no special ones. Raises ValueError where that leaves no tokens."""
    special = set(tokenizer.all_special_ids)
    plain = [i for i in range(min(len(tokenizer), vocabulary)) if i not in special]
    if config.languages is None:
        words = tokenizer.convert_ids_to_tokens(plain)
        ids = [i for i, word in zip(plain, words, strict=True) if word and _FIRST_WORD.fullmatch(word)]
        require(bool(ids), "calibration", "the tokenizer", "one with capitalised words to begin a text with (or use a text file)", "none")
        return FirstTokens(torch.tensor(ids))
    if config.languages == "any":
        return FirstTokens(torch.tensor(plain))
    spec = config.languages
    if spec == "family":
        known = model_type in PRESETS
        require(
            known,
            "calibration",
            "languages",
            f"given as LANGUAGE:SHARE,... (family is known for {', '.join(sorted(PRESETS))})",
            f"family for {model_type}",
        )
        spec = PRESETS[model_type]
    lists = {language: _read_words(Path(file)) for language, _, file in (entry.partition("=") for entry in config.words)}
    shares = parse_shares(spec)
    require(not lists.keys() - shares.keys(), "calibration", "words", f"for one of {', '.join(shares)}", ", ".join(lists.keys() - shares.keys()))
    texts = [text.strip() for text in tokenizer.batch_decode([[i] for i in plain], clean_up_tokenization_spaces=False)]
    ids, probabilities = [], []
    for language, share in shares.items():
        own = [i for i, text in zip(plain, texts, strict=True) if begins_text(text, language, lists.get(language))]
        require(bool(own), "calibration", "languages", "ones that the tokenizer has words of", f"{language}, of which it has none")
        ids += own
        probabilities += [share / sum(shares.values()) / len(own)] * len(own)
    return FirstTokens(torch.tensor(ids), torch.tensor(probabilities, dtype=torch.float64).cumsum(0))


def _read_words(path: Path) -> set[str]:
    require(path.is_file(), "calibration", "words", "LANGUAGE=FILE with a file that exists", path)
    words = {line.strip().casefold() for line in read_utf8("calibration", path).splitlines()} - {""}
    require(bool(words), "calibration", str(path), "a file of words, one a line", "none")
    return words


def begins_text(text: str, language: str, words: set[str] | None = None) -> bool:
    """Whether a text of the language (see `languages.LANGUAGES`) can begin with a token: a word, capitalised where the script has capitals.

    words: the language's own (casefolded); None goes by script, and for Latin script by the letters that the language uses. Raises ValueError for a
    language that isn't known and has no words given.
    """
    known = LANGUAGES.get(language)
    require(known is not None or words is not None, "calibration", "languages", f"of {', '.join(LANGUAGES)}, or one with a word list", language)
    if not text or text[0] != text[0].upper():
        return False
    if words is not None:
        return text.casefold() in words
    assert known is not None
    rest = text[1:]
    capitalised = text[0] == text[0].lower() or (bool(rest) and rest == rest.lower())
    return capitalised and text[0].isalpha() and all(_is_letter(character, known) for character in text)


def _is_letter(character: str, language: Language) -> bool:
    category = unicodedata.category(character)
    if category[0] not in "LM" or not unicodedata.name(character, "").startswith(language.scripts):
        return False
    lower = character.lower()
    return "LATIN" not in language.scripts or "a" <= lower <= "z" or lower in language.letters
