"""Languages by how they are written, and what the corpora of model families are made of: data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """scripts: how the Unicode names of its letters begin. letters: in Latin script, those beyond a to z."""

    scripts: tuple[str, ...]
    letters: str = ""


_LATIN = ("LATIN",)
# By ISO 639-1 code. Languages of one script have tokens in common: what tells them apart is a word list.
LANGUAGES = {
    "en": Language(_LATIN),
    "fr": Language(_LATIN, "àâæçéèêëîïôœùûüÿ"),
    "es": Language(_LATIN, "áéíñóúü"),
    "pt": Language(_LATIN, "áâãàçéêíóôõú"),
    "de": Language(_LATIN, "äöüß"),
    "it": Language(_LATIN, "àèéìòóù"),
    "nl": Language(_LATIN, "äëéïóöü"),
    "ca": Language(_LATIN, "àçèéíïòóúü·"),
    "pl": Language(_LATIN, "ąćęłńóśźż"),
    "cs": Language(_LATIN, "áčďéěíňóřšťúůýž"),
    "sv": Language(_LATIN, "åäö"),
    "tr": Language(_LATIN, "çğıöşü"),
    "id": Language(_LATIN),
    "vi": Language(_LATIN, "àáâãèéêìíòóôõùúýăđĩũơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ"),
    "zh": Language(("CJK UNIFIED",)),
    "ja": Language(("HIRAGANA", "KATAKANA", "CJK UNIFIED")),
    "ko": Language(("HANGUL",)),
    "ru": Language(("CYRILLIC",)),
    "uk": Language(("CYRILLIC",)),
    "bg": Language(("CYRILLIC",)),
    "el": Language(("GREEK",)),
    "ar": Language(("ARABIC",)),
    "fa": Language(("ARABIC",)),
    "ur": Language(("ARABIC",)),
    "he": Language(("HEBREW",)),
    "hi": Language(("DEVANAGARI",)),
    "mr": Language(("DEVANAGARI",)),
    "bn": Language(("BENGALI",)),
    "ta": Language(("TAMIL",)),
    "te": Language(("TELUGU",)),
    "th": Language(("THAI",)),
}

# The top languages of a family's training text where that was published, by `config.model_type`.
PRESETS = {
    # bytes in ROOTS (BLOOM, arXiv 2211.05100, table 1), languages above 4 %; code left out
    "bloom": "en:0.30,zh:0.16,fr:0.13,es:0.11,pt:0.05,ar:0.05",
    # GLM-130B (arXiv 2210.02414): as many English tokens as Chinese
    "glm": "en:0.5,zh:0.5",
    "glm4": "en:0.5,zh:0.5",
    # Llama 2 (arXiv 2307.09288, table 10): 90 % English, no other language above 0.2 %
    "llama": "en:1",
    # WebText, the Pile (97 % English), OPT's corpus (mostly English), RefinedWeb: English
    "gpt2": "en:1",
    "gpt_neox": "en:1",
    "opt": "en:1",
    "falcon": "en:1",
}
