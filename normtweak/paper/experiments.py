"""Which experiments there are, and which quantizations each of them compares: data only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import CalibrationConfig, QuantizeConfig

W4: dict[str, Any] = {"bits": 4, "group_size": -1, "symmetric": True}
W2: dict[str, Any] = {"bits": 2, "group_size": 64, "symmetric": False}
SCHEMES = {"W4 per-channel": W4, "W2 g64": W2}
PLAIN, LITERAL, DEFAULT = "no tweak", "+ NT (paper)", "+ NT (default)"
# Preset and what is changed in it. The literal tweak stands on the same base quantizer as the others, and all look at the same text: what differs is the tweak alone.
TWEAKS: dict[str, tuple[str, dict[str, Any]]] = {
    PLAIN: ("default", {"tweak": None}),
    LITERAL: ("paper", {}),
    DEFAULT: ("default", {"polish": {"extra_samples": 0}}),
}
ITERATIONS = (1, 2, 4, 8)
LOSSES = ("mse", "kl", "token_mse", "channel_squared", "channel")


@dataclass(frozen=True)
class Scope:
    """What the rows of every experiment have in common. sources: calibration texts beside those that need no file. languages: of the V2 text."""

    calibration: CalibrationConfig
    sources: tuple[str, ...] = ()
    languages: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of a table: what it is called, and its quantization as a preset with settings (None: the float model)."""

    labels: tuple[str, ...]
    preset: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> QuantizeConfig | None:
        """The quantization; the seed is set for each run. Raises ValueError for settings that this version doesn't have."""
        return None if self.preset is None else QuantizeConfig.preset(self.preset, **self.settings)


@dataclass(frozen=True)
class Experiment:
    """title: with the paper's number. labels: of the rows. measures: what is measured of each model, see `lab.Lab`."""

    title: str
    labels: tuple[str, ...]
    measures: tuple[str, ...]
    rows: Callable[[Scope], Iterator[Row]]


def _row(labels: tuple[str, ...], scope: Scope, tweak: str, settings: dict[str, Any]) -> Row:
    preset, base = TWEAKS[tweak]
    return Row(labels, preset, base | settings | {"calibration": scope.calibration})


def _with_float(labels: tuple[str, ...], rows: Iterator[Row]) -> Iterator[Row]:
    yield Row(("float", *[""] * (len(labels) - 1)))
    yield from rows


def _bits(scope: Scope) -> Iterator[Row]:
    for scheme, settings in SCHEMES.items():
        for tweak in TWEAKS:
            yield _row((scheme, f"GPTQ, {tweak}" if tweak == PLAIN else tweak), scope, tweak, settings)


def _bases(scope: Scope) -> Iterator[Row]:
    bases = {"RTN W4 per-channel": W4 | {"method": "rtn"}}
    bases |= {f"SmoothQuant W{bits}A8": {"method": "smoothquant", "bits": bits, "group_size": -1, "symmetric": True} for bits in (8, 5, 4)}
    for base, settings in bases.items():
        for tweak in TWEAKS:
            yield _row((base, tweak), scope, tweak, settings)


def _iterations(scope: Scope) -> Iterator[Row]:
    yield _row(("GPTQ W2 g64", "0"), scope, PLAIN, W2)
    for count in ITERATIONS:
        yield _row((f"GPTQ W2 g64, {LITERAL}", str(count)), scope, LITERAL, W2 | {"tweak": {"iterations": count}})


def _sources(scope: Scope) -> Iterator[Row]:
    plain = scope.calibration
    texts = {"random tokens": replace(plain, source="random")}
    texts |= {"generated V1 (any first token)": replace(plain, languages="any")}
    texts |= {f"generated V2 ({scope.languages or 'capitalised words'})": replace(plain, languages=scope.languages)}
    texts |= {Path(source).name: replace(plain, source=source) for source in scope.sources}
    for name, calibration in texts.items():
        for tweak in TWEAKS:
            yield _row((name, f"GPTQ W4, {tweak}" if tweak == PLAIN else tweak), replace(scope, calibration=calibration), tweak, W4)


def _losses(scope: Scope) -> Iterator[Row]:
    yield _row(("GPTQ W2 g64", "-"), scope, PLAIN, W2)
    for loss in LOSSES:
        yield _row((f"GPTQ W2 g64, {LITERAL}", loss), scope, LITERAL, W2 | {"tweak": {"loss": loss}})


_SCHEME = ("scheme", "method")
TABLES = {
    2: Experiment("Table 2: bits, GPTQ and Norm Tweaking", _SCHEME, ("quality",), lambda scope: _with_float(_SCHEME, _bits(scope))),
    3: Experiment("Table 3: CPU seconds of a quantization", _SCHEME, ("time",), _bits),
    4: Experiment("Table 4: other base quantizers", ("base", "method"), ("quality",), lambda scope: _with_float(("base", "method"), _bases(scope))),
    6: Experiment("Table 6: iterations of the tweak", ("method", "iterations"), ("quality",), _iterations),
    7: Experiment("Table 7: tasks", _SCHEME, ("tasks",), lambda scope: _with_float(_SCHEME, _bits(scope))),
    8: Experiment("Table 8: calibration text", ("calibration", "method"), ("quality",), _sources),
    9: Experiment("Table 9: losses of the tweak", ("method", "loss"), ("quality",), _losses),
}
FIGURES = {1: Experiment("Figure 1: drift of the activations, block by block", _SCHEME, ("drift",), _bits)}
