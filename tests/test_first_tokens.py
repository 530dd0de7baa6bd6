"""What a generated text may begin with: languages by script and by word list, and their shares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normtweak import CalibrationConfig
from normtweak.calibration import first_tokens
from normtweak.calibration.first_tokens import FirstTokens, begins_text
from normtweak.calibration.languages import LANGUAGES, PRESETS
from normtweak.config import parse_shares

VOCABULARY = [
    "<s>",
    "</s>",
    "▁The",
    "▁the",
    "The",
    "Été",
    "▁Ñandú",
    "Über",
    "X",
    "中",
    "中国",
    "の",
    "한국",
    "Привет",
    "привет",
    "سلام",
    "नमस्ते",
    "ि",
    "12",
    "A1",
    "�",
    "!",
]


class Tokenizer:
    """One token, one text; the first two are special."""

    all_special_ids = (0, 1)

    def __len__(self):
        return len(VOCABULARY)

    def convert_ids_to_tokens(self, ids):
        return [VOCABULARY[i] for i in ids]

    def batch_decode(self, rows, clean_up_tokenization_spaces):
        assert clean_up_tokenization_spaces is False
        return [VOCABULARY[i].replace("▁", " ") for (i,) in rows]


SIZE = len(VOCABULARY)


def find(languages, vocabulary=SIZE, model_type="bloom", **changes):
    return first_tokens.find(CalibrationConfig(languages=languages, **changes), Tokenizer(), vocabulary, model_type)


def texts(choice):
    return {VOCABULARY[i] for i in choice.ids.tolist()}


@pytest.mark.parametrize(
    ("languages", "expected"),
    [
        (None, {"▁The", "The"}),
        ("en:1", {"▁The", "The"}),
        ("fr:1", {"▁The", "The", "Été", "Über"}),
        ("es:1", {"▁The", "The", "Été", "▁Ñandú", "Über"}),
        ("de:1", {"▁The", "The", "Über"}),
        ("zh:1", {"中", "中国"}),
        ("ja:1", {"中", "中国", "の"}),
        ("ko:1", {"한국"}),
        ("ru:1", {"Привет"}),
        ("ar:1", {"سلام"}),
        ("hi:1", {"नमस्ते"}),
        ("en:0.5,zh:0.5", {"▁The", "The", "中", "中国"}),
        ("any", set(VOCABULARY[2:])),
    ],
)
def test_a_languages_tokens(languages, expected):
    assert texts(find(languages)) == expected


def test_ids_stay_below_the_vocabulary():
    assert texts(find("any", vocabulary=5)) == {"▁The", "▁the", "The"}


def test_a_word_list_tells_languages_of_one_script_apart(tmp_path):
    (tmp_path / "words").write_text("été\nthé\n\n", encoding="utf8")
    assert texts(find("fr:1", words=(f"fr={tmp_path / 'words'}",))) == {"Été"}
    (tmp_path / "other").write_text("привет", encoding="utf8")
    assert texts(find("xx:1", words=(f"xx={tmp_path / 'other'}",))) == {"Привет"}


@pytest.mark.parametrize(
    ("languages", "model_type", "words", "message"),
    [
        ("th:1", "bloom", (), "languages must be ones that the tokenizer has words of, got th, of which it has none"),
        ("tlh:1", "bloom", (), "languages must be of en, fr, .* or one with a word list, got tlh"),
        ("family", "mistral", (), r"languages must be given as LANGUAGE:SHARE,... \(family is known for bloom, .*\), got family for mistral"),
        ("fr:1", "bloom", ("fr=none.txt",), "words must be LANGUAGE=FILE with a file that exists, got none.txt"),
        ("family", "llama", ("fr=none.txt",), "words must be LANGUAGE=FILE with a file that exists"),
    ],
)
def test_what_cannot_be_found(languages, model_type, words, message):
    with pytest.raises(ValueError, match=f"calibration: {message}"):
        find(languages, model_type=model_type, words=words)


def test_a_word_list_for_a_language_that_the_family_lacks(tmp_path):
    (tmp_path / "words").write_text("été", encoding="utf8")
    with pytest.raises(ValueError, match="words must be for one of en, got fr"):
        find("family", model_type="llama", words=(f"fr={tmp_path / 'words'}",))


def test_every_preset_can_be_read_and_knows_its_languages():
    for preset in PRESETS.values():
        assert parse_shares(preset).keys() <= LANGUAGES.keys()


SHARES = st.dictionaries(st.sampled_from(["en", "zh", "ko", "ru", "hi"]), st.floats(0.01, 10), min_size=1).map(
    lambda shares: {language: round(share, 3) for language, share in shares.items()}
)


@settings(max_examples=60, deadline=None)
@given(SHARES, st.integers(1, 200), st.integers(0, 2**31))
def test_shares_hold_in_every_draw(shares, count, seed):
    choice = find(",".join(f"{language}:{share}" for language, share in shares.items()))
    drawn = choice.draw(count, torch.Generator().manual_seed(seed))
    assert drawn.shape == (count, 1)
    total = sum(shares.values())
    for language, share in shares.items():
        own = find(f"{language}:1").ids
        assert abs(torch.isin(drawn, own).sum().item() - count * share / total) < 1 + 1e-6
    assert torch.isin(drawn, choice.ids).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(0, 2**31))
def test_tokens_of_equal_probability_are_drawn_alike(size, seed):
    uniform = FirstTokens(torch.arange(size), torch.full((size,), 1 / size, dtype=torch.float64).cumsum(0))
    counts = torch.bincount(uniform.draw(3 * size, torch.Generator().manual_seed(seed)).flatten(), minlength=size)
    assert counts.min() >= 2
    assert counts.max() <= 4
    plain = FirstTokens(torch.arange(size)).draw(4000, torch.Generator().manual_seed(seed)).flatten()
    assert torch.bincount(plain, minlength=size).double().std(correction=0) < 6 * (4000 / size) ** 0.5


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=6), st.sampled_from(sorted(LANGUAGES)))
def test_whatever_begins_a_text_is_a_word_of_one_language_scripts(text, language):
    if begins_text(text, language):
        assert text == text.strip() != ""
        assert text[0].isalpha()
        assert not any(character.isdigit() or character.isspace() for character in text)
        assert text[0] == text[0].upper()


@given(st.dictionaries(st.sampled_from(sorted(LANGUAGES)), st.integers(1, 99), min_size=1))
def test_shares_are_read_as_written(shares):
    text = ",".join(f"{language}:0.{share:02}" for language, share in shares.items())
    assert parse_shares(text) == {language: share / 100 for language, share in shares.items()}
    assert CalibrationConfig(languages=text).languages == text


@pytest.mark.parametrize("text", ["", "en", "en:", "en:0", "en:-1", "en:1,en:2", "en:1;zh:2", "en:x", ":1", "en:1,"])
def test_shares_that_will_not_do(text):
    with pytest.raises(ValueError, match="CalibrationConfig: languages must be any, family, or languages and shares above 0"):
        CalibrationConfig(languages=text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "random", "languages": "en:1"}, "languages must be left out unless the source is generated"),
        ({"words": ("en=file",)}, "words must be LANGUAGE=FILE for one of the languages"),
        ({"languages": "en:1", "words": ("fr=file",)}, "words must be LANGUAGE=FILE for one of the languages"),
        ({"field": "text"}, "field must be left out unless the source is a .jsonl file or hf:NAME"),
        ({"source": "file.txt", "chat": True}, "chat must be left out unless"),
        ({"source": "file.jsonl", "split": "test"}, "split must be left out unless the source is hf:NAME"),
        ({"subset": "a"}, "subset must be left out unless the source is hf:NAME"),
    ],
)
def test_options_of_other_sources(changes, message):
    with pytest.raises(ValueError, match=f"CalibrationConfig: {message}"):
        CalibrationConfig(**changes)
