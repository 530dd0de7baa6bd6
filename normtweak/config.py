"""What a run is told: frozen dataclasses, checked when made, unknown keys refused."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from .checks import check_pattern, from_dict, one_of, require

BITS = (2, 3, 4, 5, 8)
METHODS = ("gptq", "rtn", "awq", "smoothquant", "autoround")


def stored_bits(bits: int) -> int:
    """In how many bits a code is stored: no checkpoint format has 5-bit codes, so they go as 8-bit codes of which 32 are used."""
    return 8 if bits == 5 else bits


@dataclass(frozen=True)
class CalibrationConfig:
    """The text that the quantizer and the tweak see.

    source: "generated" (the model writes it itself), "random" (uniform token ids), the path of a UTF-8 text file or of a .jsonl file, or "hf:NAME": a dataset
    of the hub or a folder that the package datasets reads.
    samples, length: number of sequences and tokens in each. batch_size: sequences run through a block at once.
    greedy_tokens: how many tokens after the first are the likeliest ones, before sampling at temperature 1 begins (LLM-QAT,
    arXiv 2305.17888, section 3.1).
    languages: what a generated text may begin with: None, a capitalised word; "any", any token (LLM-QAT); "en:0.49,zh:0.26", words of these
    languages in these proportions (Norm Tweaking, arXiv 2309.02784: the top languages of the model's training text); "family", the model family's own.
    words: "LANGUAGE=FILE" each, a file of a language's words, one a line, where the script alone doesn't tell its tokens.
    field: of a .jsonl line or a dataset's row, None for "text" ("messages" with chat). subset, split: of a dataset. chat: the field holds messages, for the
    tokenizer's chat template.
    cache: keep generated text in the user's cache folder, and take it from there.
    """

    source: str = "generated"
    samples: int = 64
    length: int = 256
    # 4 x 512 tokens keep a model's activations in memory that the allocator hands out again: at 8 its largest tensors are fresh pages each
    # time, which takes a tenth of the pass.
    batch_size: int = 4
    greedy_tokens: int = 4
    languages: str | None = None
    words: tuple[str, ...] = ()
    field: str | None = None
    subset: str | None = None
    split: str = "train"
    chat: bool = False
    cache: bool = True

    def __post_init__(self) -> None:
        where = "CalibrationConfig"
        require(isinstance(self.source, str) and bool(self.source), where, "source", "generated, random, a file's path or hf:NAME", self.source)
        require(self.samples >= 1, where, "samples", "1 or more", self.samples)
        require(self.length >= 8, where, "length", "8 or more tokens", self.length)
        require(self.batch_size >= 1, where, "batch_size", "1 or more", self.batch_size)
        require(0 <= self.greedy_tokens < self.length, where, "greedy_tokens", f"0 to {self.length - 1}", self.greedy_tokens)
        require(self.languages is None or self.source == "generated", where, "languages", "left out unless the source is generated", self.languages)
        listed = parse_shares(self.languages or "") if self.languages not in (None, "any", "family") else {}
        for entry in self.words:
            language, _, file = entry.partition("=")
            known = language in listed or (self.languages == "family" and language)
            require(bool(known and file), where, "words", "LANGUAGE=FILE for one of the languages", entry)
        dataset = self.source.startswith("hf:")
        # read as plain text, its braces and keys would be what the model is calibrated on
        require(
            dataset or not self.source.lower().endswith(".json"),
            where,
            "source",
            "a .jsonl file, one object a line, where it holds JSON",
            self.source,
        )
        for argument in ("field", "chat"):
            value = getattr(self, argument)
            require(not value or self.documents, where, argument, "left out unless the source is a .jsonl file or hf:NAME", value)
        for argument, given in (("subset", self.subset is not None), ("split", self.split != "train")):
            require(not given or dataset, where, argument, "left out unless the source is hf:NAME", getattr(self, argument))

    @property
    def documents(self) -> bool:
        """Whether the source holds documents with fields: a .jsonl file or a dataset."""
        return self.source.startswith("hf:") or self.source.lower().endswith(".jsonl")


def parse_shares(text: str) -> dict[str, float]:
    """Languages and their shares from "en:0.49,zh:0.26"; shares are proportions and need not add up to 1. Raises ValueError for anything else."""
    shares: dict[str, float] = {}
    for entry in text.split(","):
        form = re.fullmatch(r"\s*(?P<language>[A-Za-z-]+):(?P<share>\d+(\.\d*)?|\.\d+)\s*", entry)
        good = form is not None and float(form["share"]) > 0 and form["language"] not in shares
        require(
            good, "CalibrationConfig", "languages", 'any, family, or languages and shares above 0 as in "en:0.49,zh:0.26", each once', text or "''"
        )
        assert form is not None
        shares[form["language"]] = float(form["share"])
    return shares


@dataclass(frozen=True)
class TweakConfig:
    """How the norm parameters of each block are tweaked (Norm Tweaking, arXiv 2309.02784, Algorithm 1).

    loss: a file's entry in `losses/`: "channel" (eq. 2), "channel_squared", "token_mse", "mse" or "kl".
    target_stream: what the float block is fed to get the target: "quantized" (Algorithm 1: the tweaked quantized output of the block before) or
    "float" (the float model's own activations).
    step: "relative" (gain = gain0 * (1 + delta), Adam moves delta) or "absolute" (Adam moves the parameter).
    learning_rate, depth_scale: eq. 3, lr_i = learning_rate * (1 + depth_scale * i / L) for block i of L. None for the learning rate: each block
    tries several and keeps the one, or none, that its held-out sequences like best.
    schedule: how the rate goes on within a block: "constant", or "linear" down to 0.
    iterations: passes over the calibration text. batch_size: sequences a step.
    skip_first_token: leave position 0, where models keep a massive activation, out of the loss.
    held_out: share of the sequences (at least one of two or more, if above 0) that is not trained on; the loss that is reported is theirs.
    reject_worse: put a block's norms back when that loss didn't fall.
    """

    loss: str = "token_mse"
    target_stream: str = "float"
    step: str = "relative"
    learning_rate: float | None = 3e-4
    depth_scale: float = 0.0
    schedule: str = "linear"
    iterations: int = 1
    batch_size: int = 2
    skip_first_token: bool = True
    held_out: float = 0.125
    reject_worse: bool = True

    def __post_init__(self) -> None:
        where = "TweakConfig"
        one_of(where, "loss", self.loss, ("channel", "channel_squared", "token_mse", "mse", "kl"))
        one_of(where, "target_stream", self.target_stream, ("float", "quantized"))
        one_of(where, "step", self.step, ("relative", "absolute"))
        _check_rate(where, self.learning_rate)
        require(self.learning_rate is not None or self.held_out > 0, where, "held_out", "above 0 to find a learning rate", self.held_out)
        require(self.depth_scale >= 0, where, "depth_scale", "0 or more", self.depth_scale)
        one_of(where, "schedule", self.schedule, ("constant", "linear"))
        require(0 <= self.held_out <= 0.5, where, "held_out", "0 to 0.5", self.held_out)
        require(self.iterations >= 1, where, "iterations", "1 or more", self.iterations)
        require(self.batch_size >= 1, where, "batch_size", "1 or more", self.batch_size)

    def learning_rates(self) -> tuple[float, ...]:
        """What to try, in rising order: the one that is given, else a grid for the kind of step."""
        if self.learning_rate is not None:
            return (self.learning_rate,)
        return (3e-4, 1e-3, 3e-3, 1e-2) if self.step == "relative" else (1e-6, 1e-5, 1e-4, 1e-3)


@dataclass(frozen=True)
class ModuleOverride:
    """Bits and group size of some linears: those in whose path `pattern`, a regular expression, is found. None keeps the run's own."""

    pattern: str
    bits: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        where = "ModuleOverride"
        check_pattern(where, "pattern", self.pattern)
        require(self.bits is not None or self.group_size is not None, where, "bits, group_size", "given, one of them at least", "neither")
        require(self.bits is None or self.bits in BITS, where, "bits", "one of " + ", ".join(map(str, BITS)), self.bits)
        _check_group_size(where, -1 if self.group_size is None else self.group_size)

    def given(self) -> dict[str, Any]:
        """Bits and group size, of them what isn't None."""
        settings = {"bits": self.bits, "group_size": self.group_size}
        return {key: value for key, value in settings.items() if value is not None}

    @classmethod
    def parse(cls, text: str) -> ModuleOverride:
        """From `PATTERN=BITS` or `PATTERN=BITS:GROUP_SIZE`. Raises ValueError for anything else."""
        form = re.fullmatch(r"(?P<pattern>.+)=(?P<bits>\d+)(:(?P<group_size>-?\d+))?", text)
        require(form is not None, "ModuleOverride", "text", "PATTERN=BITS or PATTERN=BITS:GROUP_SIZE", text)
        assert form is not None
        return cls(form["pattern"], int(form["bits"]), int(form["group_size"]) if form["group_size"] else None)


def _check_rate(where: str, rate: float | None) -> None:
    require(rate is None or 0 < rate < 1, where, "learning_rate", "between 0 and 1, or None to try several", rate)


def _check_group_size(where: str, group_size: int) -> None:
    require(group_size == -1 or group_size >= 1, where, "group_size", "-1 (per channel) or 1 or more", group_size)


@dataclass(frozen=True)
class PolishConfig:
    """How all norms of the packed model are polished together after the last block (polish.py; an extension of the paper).

    learning_rate: of Adam on relative steps, gain = gain0 * (1 + delta), falling linearly to 0; None tries several on a part of the text. iterations: passes over the calibration text.
    batch_size: sequences a step. held_out: share of the sequences, one to 16 of them, that is not trained on. min_gain: the norms are left as the quantizer left them unless the divergence
    from the float model falls by this share there: what gains less on the model's own text gains nothing on other text (docs/experiments.md). extra_samples: sequences of the
    calibration's text that are polished on beside those that the quantizer is given; new text wins more than further passes over the old.
    """

    learning_rate: float | None = 5e-3
    iterations: int = 1
    batch_size: int = 2
    held_out: float = 0.125
    min_gain: float = 0.03
    extra_samples: int = 0

    def __post_init__(self) -> None:
        where = "PolishConfig"
        _check_rate(where, self.learning_rate)
        require(self.iterations >= 1, where, "iterations", "1 or more", self.iterations)
        require(self.batch_size >= 1, where, "batch_size", "1 or more", self.batch_size)
        require(0 < self.held_out <= 0.5, where, "held_out", "above 0 and up to 0.5", self.held_out)
        require(0 <= self.min_gain < 1, where, "min_gain", "0 or more and below 1", self.min_gain)
        require(self.extra_samples >= 0, where, "extra_samples", "0 or more", self.extra_samples)


@dataclass(frozen=True)
class QuantizeConfig:
    """One quantization run.

    bits: 2, 3, 4, 5 (stored in 8) or 8. group_size: columns that share a scale, or -1 for one scale per output row. symmetric: codes centred on zero.
    method: "gptq", "rtn", "awq" (scales found for the weights that matter), "smoothquant" (scales that make activations easy to round, which are then multiplied as
    int8) or "autoround" (learned rounding, by the package auto-round). rounding: what AWQ and SmoothQuant round with once their scales are found: "nearest" or "gptq".
    rounding_iterations: AutoRound's. activations: how they enter the packed products, "auto" (as exactly as their dtype) or "int8_token" (one scale a token); None takes what the
    method is for, int8_token for SmoothQuant and auto for the others. damp_percent: fraction of the Hessian's mean diagonal that is added to it. act_order: quantize the columns
    with the largest Hessian diagonal first (groups stay where they are: static groups). block_size: columns per GPTQ block, where
    the solve goes by blocks of one width (on a CPU with native kernels it doesn't).
    clip_steps: candidates of the clip search, 0 for plain min-max ranges. sequential: a block's linears are quantized in the order of their calls, each
    on the inputs that the ones before it give when quantized. correction: share, 0 to 1, of what those inputs lack of the float model's own that is made
    good: W + share * W D H^-1 is quantized for W, D = (F - X)^T X for inputs F in the float model and X here (the target of GPTAQ, arXiv 2504.02692).
    overrides: other bits and group sizes for some linears; the first whose pattern is found in a linear's path counts. skip: patterns of linears
    that stay as they are, which counts before any override. lm_head: quantize the output head too.
    tweak: how each block's norms are tweaked, or None to leave them. polish: how all norms are polished at the end, or
    None; the default preset polishes unless its tweak is None. format: of the checkpoint, "gptq", "gptq_v2" or "compressed-tensors", or "auto": gptq for symmetric
    codes, gptq_v2 for others, whose zero points version 1 can't all hold. compute_dtype: "auto", "float32" or "bfloat16", in which activations are multiplied.
    """

    bits: int = 4
    group_size: int = -1
    symmetric: bool = True
    method: str = "gptq"
    rounding: str = "nearest"
    rounding_iterations: int = 200
    activations: str | None = None
    damp_percent: float = 0.01
    act_order: bool = True
    block_size: int = 128
    clip_steps: int = 24
    sequential: bool = True
    correction: float = 0.5
    overrides: tuple[ModuleOverride, ...] = ()
    skip: tuple[str, ...] = ()
    lm_head: bool = False
    tweak: TweakConfig | None = field(default_factory=TweakConfig)
    polish: PolishConfig | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    format: str = "auto"
    compute_dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        where = "QuantizeConfig"
        one_of(where, "bits", self.bits, BITS)
        _check_group_size(where, self.group_size)
        for pattern in self.skip:
            check_pattern(where, "skip", pattern)
        one_of(where, "method", self.method, METHODS)
        one_of(where, "rounding", self.rounding, ("nearest", "gptq"))
        chosen = self.method in ("awq", "smoothquant")
        require(self.rounding == "nearest" or chosen, where, "rounding", f"nearest for {self.method}, which rounds in its own way", self.rounding)
        require(self.rounding_iterations >= 1, where, "rounding_iterations", "1 or more", self.rounding_iterations)
        one_of(where, "activations", self.activations, (None, "auto", "int8_token"))
        require(not (self.lm_head and self.method == "autoround"), where, "lm_head", "off with autoround, which learns whole blocks", "on")
        require(0 < self.damp_percent < 1, where, "damp_percent", "a fraction between 0 and 1", self.damp_percent)
        require(self.block_size >= 1, where, "block_size", "1 or more", self.block_size)
        require(0 <= self.clip_steps <= 1000, where, "clip_steps", "0 to 1000", self.clip_steps)
        one_of(where, "format", self.format, ("auto", "gptq", "gptq_v2", "compressed-tensors"))
        held = self.symmetric or self.format != "gptq"
        require(
            held, where, "format", "auto, gptq_v2 or compressed-tensors for asymmetric codes (gptq, version 1, has no zero point of 0)", self.format
        )
        require(0 <= self.correction <= 1, where, "correction", "0 to 1", self.correction)
        one_of(where, "compute_dtype", self.compute_dtype, ("auto", "float32", "bfloat16"))
        require(0 <= self.seed < 2**32, where, "seed", f"0 to {2**32 - 1}", self.seed)

    @classmethod
    def preset(cls, name: str = "default", **settings: Any) -> QuantizeConfig:
        """A preset with some settings replaced: `QuantizeConfig.preset("paper", bits=2, group_size=64, tweak={"iterations": 2})`.

        "default" is the best recipe measured on a real model; "paper" is Algorithm 1 to the letter. A tweak of None leaves out the default preset's polish too, unless that is given.
        Raises ValueError for other names or settings.
        """
        one_of("QuantizeConfig", "preset", name, tuple(TWEAK_PRESETS))
        bits, polish = settings.get("bits", cls.bits), settings.get("polish", {})
        if name == "default" and isinstance(polish, dict) and settings.get("tweak", {}) is not None:
            settings["polish"] = _default_polish(bits, settings, polish)
            if settings.get("method", cls.method) == "gptq" and (bits != 2 or settings["polish"]["extra_samples"] != 0):
                # After GPTQ a block's tweak gains nothing that the polish alone doesn't, but at 2 bits where it has no text of its own (docs/experiments.md).
                settings.setdefault("tweak", None)
        tweak = settings.get("tweak", {})
        if isinstance(tweak, dict):
            settings["tweak"] = dataclasses.asdict(TWEAK_PRESETS[name](bits)) | tweak
        return cls.from_dict(settings)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> QuantizeConfig:
        """From plain data, nested dictionaries for `tweak` and `calibration`. Raises ValueError for an unknown key or a value of the wrong type."""
        return from_dict(cls, settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` takes."""
        return dataclasses.asdict(self)

    def for_module(self, path: str) -> QuantizeConfig | None:
        """The settings of the linear at `path` in the model, its own bits and group size in place; None for one that is skipped."""
        if any(re.search(pattern, path) for pattern in self.skip):
            return None
        own = next((override for override in self.overrides if re.search(override.pattern, path)), None)
        if own is None:
            return self
        return dataclasses.replace(self, **own.given())

    @property
    def packed_activations(self) -> str:
        """How activations enter the packed products."""
        return self.activations or ("int8_token" if self.method == "smoothquant" else "auto")

    @property
    def changes_norms(self) -> bool:
        """Whether blocks' norms come out changed: by a tweak, or by scales that moved out of them."""
        return self.tweak is not None or self.method in ("awq", "smoothquant")

    @property
    def written_format(self) -> str:
        """The checkpoint's format, auto decided."""
        auto = "gptq" if self.symmetric else "gptq_v2"
        return auto if self.format == "auto" else self.format

    @property
    def needs_calibration(self) -> bool:
        """Whether any text is looked at."""
        return self.method != "rtn" or self.tweak is not None or self.polish is not None

    @property
    def needs_float_stream(self) -> bool:
        """Whether the float model's own activations are looked at."""
        tweaked = self.tweak is not None and self.tweak.target_stream == "float"
        return self.polish is not None or tweaked or self.method == "autoround" or (self.method == "gptq" and self.correction > 0)


@dataclass(frozen=True)
class RetweakConfig:
    """How the norms of a packed checkpoint are tweaked: block by block (None: not), then polished together (None: not). See QuantizeConfig."""

    tweak: TweakConfig | None = field(default_factory=TweakConfig)
    polish: PolishConfig | None = field(default_factory=PolishConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    compute_dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        where = "RetweakConfig"
        require(self.tweak is not None or self.polish is not None, where, "tweak, polish", "given, one of them at least", "neither")
        one_of(where, "compute_dtype", self.compute_dtype, ("auto", "float32", "bfloat16"))
        require(0 <= self.seed < 2**32, where, "seed", f"0 to {2**32 - 1}", self.seed)

    @classmethod
    def preset(cls, bits: int, /, **settings: Any) -> RetweakConfig:
        """The best recipe measured for a checkpoint of so many bits, with some settings replaced. Raises ValueError for unknown ones."""
        tweak = settings.get("tweak", {})
        if isinstance(tweak, dict):
            settings["tweak"] = dataclasses.asdict(_default_tweak(bits)) | tweak
        polish = settings.get("polish", {})
        if isinstance(polish, dict):
            settings["polish"] = _default_polish(bits, settings, polish)
        return from_dict(cls, settings)


def _default_tweak(bits: int) -> TweakConfig:
    # The coarser the codes, the more there is for the norms to make good: measured on SmolLM2-135M at 2 and 4 bits (docs/results.md).
    return TweakConfig(learning_rate=2e-3 if bits == 2 else 3e-4)


def _default_polish(bits: int, settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {"learning_rate": 1e-2 if bits == 2 else 5e-3, "batch_size": 1 if bits == 3 else PolishConfig.batch_size}
    if bits == 2 and given.get("extra_samples") != 0:
        # Five times the text wins twice as much, at 3 bits hardly more (docs/experiments.md).
        own |= {"batch_size": 1, "extra_samples": 4 * _samples(settings)}
    return dataclasses.asdict(PolishConfig()) | own | given


def _samples(settings: dict[str, Any]) -> int:
    """The calibration sequences that a configuration's settings ask for; what is no number is complained of when the configuration is made."""
    calibration = settings.get("calibration")
    given = calibration.get("samples") if isinstance(calibration, dict) else getattr(calibration, "samples", None)
    return given if isinstance(given, int) and given > 0 else CalibrationConfig.samples


def _paper_tweak(bits: int) -> TweakConfig:
    return TweakConfig(
        loss="channel",
        target_stream="quantized",
        step="absolute",
        learning_rate=1e-5,
        depth_scale=1.0,
        schedule="constant",
        iterations=1,
        skip_first_token=False,
        held_out=0.0,
        reject_worse=False,
    )


TWEAK_PRESETS = {"default": _default_tweak, "paper": _paper_tweak}
