"""What a run is told: frozen dataclasses, checked when made, unknown keys refused."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BITS = (2, 3, 4, 8)


def require(condition: bool, where: str, argument: str, wanted: str, got: object) -> None:
    """Raise the house's ValueError, `where: argument must be wanted, got got`, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{where}: {argument} must be {wanted}, got {got}")


def _one_of(where: str, argument: str, value: object, choices: tuple[object, ...]) -> None:
    require(value in choices, where, argument, "one of " + ", ".join(map(str, choices)), value)


@dataclass(frozen=True)
class CalibrationConfig:
    """The text that the quantizer and the tweak see.

    source: "generated" (the model writes it itself), "random" (uniform token ids) or the path of a text file.
    samples, length: number of sequences and tokens in each. batch_size: sequences run through a block at once.
    greedy_tokens: how many tokens after the first are the likeliest ones, before sampling at temperature 1 begins (LLM-QAT,
    arXiv 2305.17888, section 3.1).
    """

    source: str = "generated"
    samples: int = 64
    length: int = 256
    # 4 x 512 tokens keep a model's activations in memory that the allocator hands out again: at 8 its largest tensors are fresh pages each
    # time, which takes a tenth of the pass.
    batch_size: int = 4
    greedy_tokens: int = 4

    def __post_init__(self) -> None:
        where = "CalibrationConfig"
        require(isinstance(self.source, str) and bool(self.source), where, "source", "generated, random or a file's path", self.source)
        require(self.samples >= 1, where, "samples", "1 or more", self.samples)
        require(self.length >= 8, where, "length", "8 or more tokens", self.length)
        require(self.batch_size >= 1, where, "batch_size", "1 or more", self.batch_size)
        require(0 <= self.greedy_tokens < self.length, where, "greedy_tokens", f"0 to {self.length - 1}", self.greedy_tokens)


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
        _one_of(where, "loss", self.loss, ("channel", "channel_squared", "token_mse", "mse", "kl"))
        _one_of(where, "target_stream", self.target_stream, ("float", "quantized"))
        _one_of(where, "step", self.step, ("relative", "absolute"))
        _check_rate(where, self.learning_rate)
        require(self.learning_rate is not None or self.held_out > 0, where, "held_out", "above 0 to find a learning rate", self.held_out)
        require(self.depth_scale >= 0, where, "depth_scale", "0 or more", self.depth_scale)
        _one_of(where, "schedule", self.schedule, ("constant", "linear"))
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
        _check_pattern(where, "pattern", self.pattern)
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


def _check_pattern(where: str, argument: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: {argument} must be a regular expression, got {pattern!r} ({error})") from None
    require(bool(pattern), where, argument, "a regular expression", "an empty one")


def _check_rate(where: str, rate: float | None) -> None:
    require(rate is None or 0 < rate < 1, where, "learning_rate", "between 0 and 1, or None to try several", rate)


def _check_group_size(where: str, group_size: int) -> None:
    require(group_size == -1 or group_size >= 1, where, "group_size", "-1 (per channel) or 1 or more", group_size)


@dataclass(frozen=True)
class PolishConfig:
    """How all norms of the packed model are polished together after the last block (polish.py; an extension of the paper).

    learning_rate: of Adam on relative steps, gain = gain0 * (1 + delta), falling linearly to 0; None tries several on a part of the text. iterations: passes over the calibration text.
    batch_size: sequences a step. held_out: share of the sequences, at least one, that is not trained on: unless the divergence from the float
    model falls on them, the norms are left as they were.
    """

    learning_rate: float | None = 5e-3
    iterations: int = 1
    batch_size: int = 2
    held_out: float = 0.125

    def __post_init__(self) -> None:
        where = "PolishConfig"
        _check_rate(where, self.learning_rate)
        require(self.iterations >= 1, where, "iterations", "1 or more", self.iterations)
        require(self.batch_size >= 1, where, "batch_size", "1 or more", self.batch_size)
        require(0 < self.held_out <= 0.5, where, "held_out", "above 0 and up to 0.5", self.held_out)


@dataclass(frozen=True)
class QuantizeConfig:
    """One quantization run.

    bits: 2, 3, 4 or 8. group_size: columns that share a scale, or -1 for one scale per output row. symmetric: codes centred on zero.
    method: "gptq" or "rtn". damp_percent: fraction of the Hessian's mean diagonal that is added to it. act_order: quantize the columns
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
        _one_of(where, "bits", self.bits, BITS)
        _check_group_size(where, self.group_size)
        for pattern in self.skip:
            _check_pattern(where, "skip", pattern)
        _one_of(where, "method", self.method, ("gptq", "rtn"))
        require(0 < self.damp_percent < 1, where, "damp_percent", "a fraction between 0 and 1", self.damp_percent)
        require(self.block_size >= 1, where, "block_size", "1 or more", self.block_size)
        require(0 <= self.clip_steps <= 1000, where, "clip_steps", "0 to 1000", self.clip_steps)
        _one_of(where, "format", self.format, ("auto", "gptq", "gptq_v2", "compressed-tensors"))
        held = self.symmetric or self.format != "gptq"
        require(
            held, where, "format", "auto, gptq_v2 or compressed-tensors for asymmetric codes (gptq, version 1, has no zero point of 0)", self.format
        )
        require(0 <= self.correction <= 1, where, "correction", "0 to 1", self.correction)
        _one_of(where, "compute_dtype", self.compute_dtype, ("auto", "float32", "bfloat16"))
        require(self.seed >= 0, where, "seed", "0 or more", self.seed)

    @classmethod
    def preset(cls, name: str = "default", **settings: Any) -> QuantizeConfig:
        """A preset with some settings replaced: `QuantizeConfig.preset("paper", bits=2, group_size=64, tweak={"iterations": 2})`.

        "default" is the best recipe measured on a real model; "paper" is Algorithm 1 to the letter. Raises ValueError for other names or settings.
        """
        _one_of("QuantizeConfig", "preset", name, tuple(TWEAK_PRESETS))
        tweak = settings.get("tweak", {})
        if isinstance(tweak, dict):
            bits = settings.get("bits", cls.bits)
            settings["tweak"] = dataclasses.asdict(TWEAK_PRESETS[name](bits)) | tweak
        if name == "default" and settings.get("tweak", tweak) is not None:
            polish = settings.get("polish", {})
            if isinstance(polish, dict):
                settings["polish"] = dataclasses.asdict(_default_polish(settings.get("bits", cls.bits))) | polish
        return cls.from_dict(settings)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> QuantizeConfig:
        """From plain data, nested dictionaries for `tweak` and `calibration`. Raises ValueError for an unknown key or a value of the wrong type."""
        return _from_dict(cls, settings)

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
        return self.polish is not None or tweaked or (self.method == "gptq" and self.correction > 0)


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
        _one_of(where, "compute_dtype", self.compute_dtype, ("auto", "float32", "bfloat16"))
        require(self.seed >= 0, where, "seed", "0 or more", self.seed)

    @classmethod
    def preset(cls, bits: int, /, **settings: Any) -> RetweakConfig:
        """The best recipe measured for a checkpoint of so many bits, with some settings replaced. Raises ValueError for unknown ones."""
        tweak = settings.get("tweak", {})
        if isinstance(tweak, dict):
            settings["tweak"] = dataclasses.asdict(_default_tweak(bits)) | tweak
        return _from_dict(cls, settings)


def _default_tweak(bits: int) -> TweakConfig:
    # The coarser the codes, the more there is for the norms to make good: measured on SmolLM2-135M at 2 and 4 bits (docs/results.md).
    return TweakConfig(learning_rate=2e-3 if bits == 2 else 3e-4)


def _default_polish(bits: int) -> PolishConfig:
    # docs/experiments.md
    return PolishConfig(learning_rate=1e-2 if bits == 2 else 5e-3)


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


def _from_dict(cls: Any, settings: Any) -> Any:
    where = cls.__name__
    require(isinstance(settings, dict), where, "settings", "a table of names and values", settings)
    types = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        require(key in types, where, "key", "one of " + ", ".join(types), key)
        values[key] = _typed(where, key, types[key], value)
    return cls(**values)


def _typed(where: str, key: str, wanted: Any, value: Any) -> Any:
    if typing.get_origin(wanted) is tuple:
        require(isinstance(value, list | tuple), where, key, "a list", repr(value))
        return tuple(_typed(where, key, typing.get_args(wanted)[0], item) for item in value)
    options: tuple[Any, ...] = typing.get_args(wanted) or (wanted,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            return value if type(value) is option else _from_dict(option, value)
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, option) and (option is not int or not isinstance(value, bool)):
            return value
    names = " or ".join(option.__name__ for option in options)
    raise ValueError(f"{where}: {key} must be {names}, got {value!r}")


def check_out_folder(out: Path) -> None:
    """Raise ValueError unless `out` is free: missing, or an empty folder, under a parent that exists."""
    require(
        not out.exists() or (out.is_dir() and not any(out.iterdir())), "quantize", "out", "a new or empty folder", f"{out}, which holds something"
    )
    out = out.resolve()
    require(out.parent.is_dir(), "quantize", "out", "in a folder that exists", out)
    # the finished folder is renamed to its place, which no mount point can be
    require(not os.path.ismount(out), "quantize", "out", "a folder inside a mounted one", f"{out}, which is a mount point")
