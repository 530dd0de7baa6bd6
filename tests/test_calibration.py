import pytest
import torch

from calibrating import ids, run
from normtweak import CalibrationConfig, calibration, models
from normtweak.calibration import first_tokens, generated, quality


@pytest.mark.parametrize("source", ["generated", "random"])
def test_shape_seed_and_no_special_tokens(small_model, source):
    first = ids(small_model, source=source)
    assert first.shape == (5, 20)
    assert first.dtype == torch.int64
    special = models.ModelFolder(small_model).tokenizer.all_special_ids
    assert not torch.isin(first, torch.tensor(special)).any()
    assert torch.equal(first, ids(small_model, source=source))
    assert not torch.equal(first, ids(small_model, source=source, seed=1))


def test_generated_text_begins_with_a_capitalised_word(small_model):
    tokenizer = models.ModelFolder(small_model).tokenizer
    allowed = first_tokens.find(CalibrationConfig(), tokenizer, len(tokenizer), "llama").ids
    assert sorted(tokenizer.convert_ids_to_tokens(allowed.tolist())) == ["Once", "One", "The"]
    assert torch.isin(ids(small_model)[:, 0], allowed).all()


def test_greedy_tokens_are_the_likeliest(small_model):
    model = models.load(small_model)
    tokens = ids(small_model, greedy_tokens=19)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    logits[..., models.ModelFolder(small_model).tokenizer.all_special_ids] = -torch.inf
    expected = logits.argmax(-1)
    assert (expected == tokens[:, 1:]).float().mean() > 0.9  # a sequence that meets the end of text goes on with a fresh word


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).repeat(20000, 1)
    drawn = generated.sample(logits.clone(), torch.Generator().manual_seed(0)).flatten()
    counts = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(counts, logits[0].softmax(-1), atol=0.015, rtol=0)
    assert counts[3] == 0


def test_sampling_never_takes_an_impossible_first_or_last_token():
    class Extreme(torch.Generator):
        pass

    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for value in (0.0, 1.0 - 2**-24):
        original, torch.rand = torch.rand, lambda shape, value=value, **kwargs: torch.full(shape, value)
        try:
            assert generated.sample(logits.clone(), Extreme()).item() == 1
        finally:
            torch.rand = original


def test_text_file(small_model, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(97 + i % 26) for i in range(500)), encoding="utf8")
    tokens = ids(small_model, source=str(file))
    assert tokens.shape == (5, 20)
    tokenizer = models.ModelFolder(small_model).tokenizer
    text = tokenizer.decode(tokens[0]).replace(" ", "")
    assert text in file.read_text()


def test_files_that_will_not_do(small_model, tmp_path):
    with pytest.raises(ValueError, match="calibration: source must be generated, random or a text file, got nothing.txt"):
        ids(small_model, source="nothing.txt")
    (tmp_path / "short").write_text("short")
    with pytest.raises(ValueError, match="at least samples x length = 100 tokens long, got 5 tokens"):
        ids(small_model, source=str(tmp_path / "short"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01" * 100)
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        ids(small_model, source=str(tmp_path / "binary"))


def test_bos_goes_first_where_the_tokenizer_puts_it(small_model):
    class WithBos:
        bos_token_id, all_special_ids = 7, [7]

        def __call__(self, text, add_special_tokens=True):
            return type("Encoding", (), {"input_ids": [7, 1] if add_special_tokens else [1]})

    assert calibration.leading_bos(models.ModelFolder(small_model).tokenizer) is None
    assert calibration.with_bos(torch.tensor([[1, 2, 3]]), WithBos()).tolist() == [[7, 1, 2]]


def test_report_of_generated_text(small_model):
    report = run(small_model, samples=40, length=60).report
    assert (report.source, report.sequences, report.length) == ("generated", 40, 60)
    assert report.special == 0
    assert report.tokens_per_second > 0
    assert report.ends > 0
    assert "ends of text replaced" in str(report)
    assert "tokens/s" in str(report)


def test_unusable_text_is_counted_once_by_what_it_is(small_model):
    tokenizer = models.ModelFolder(small_model).tokenizer
    good = torch.arange(2, 34)
    repeated = good[:8].repeat(4)  # of 29 4-grams 8 are different
    special = good.clone()
    special[9] = tokenizer.eos_token_id
    both = repeated.clone()
    both[9] = tokenizer.eos_token_id
    led = good.clone()
    led[0] = tokenizer.bos_token_id
    rows = torch.stack([good, repeated, special, both, led])
    assert quality.repetition(rows)[:2].tolist() == [0.0, 1 - 8 / 29]
    report = quality.TextReport.of("a file", rows, tokenizer)
    assert (report.repetitive, report.special, report.unreadable) == (2, 2, 0)
    assert report.unusable == 3 / 5
    assert quality.TextReport.of("a file", rows, tokenizer, templated=True).special == 0
    assert "60.0% of the sequences unusable (2 repetitive, 2 with special tokens, 0 unreadable)" in str(report)


def test_unreadable_text():
    class Decoder:
        all_special_ids, bos_token_id = [], None

        def batch_decode(self, rows):
            return ["\ufffdcut at both ends, which is no fault\ufffd", "bro\ufffdken", "\ufffd\ufffd"]

    rows = torch.arange(24).view(3, 8)
    assert quality.TextReport.of("a file", rows, Decoder()).unreadable == 2
