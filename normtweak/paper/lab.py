"""Runs quantizations and measures them, each once: what is finished lies in the folder and is taken from there."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from .. import models
from ..activations import compute_dtype, device_of
from ..calibration import Calibration, leading_bos
from ..checkpoint import write_json
from ..config import QuantizeConfig, require
from ..evaluate import Suite, check_names, read_text, score, text_windows
from ..models import ModelFolder
from ..pipeline import quantize
from ..progress import Progress
from ..sequences import calibration_text
from .drift import channel_statistics, drift

logger = logging.getLogger(__name__)
# Windows whose activations are looked at.
DRIFT_WINDOWS = 4


class _Settings(TypedDict):
    dtype: torch.dtype
    progress: Progress


@dataclass(frozen=True)
class Evaluation:
    """What models are measured by: texts by name, windows of each and their length, last words and choices by JSONL file, so many items of each at most."""

    texts: tuple[str, ...]
    windows: int
    length: int
    lambada: tuple[Path, ...] = ()
    choices: tuple[Path, ...] = ()
    limit: int | None = None


class Lab:
    """Measures a model's quantizations in a folder of its own.

    measures: "quality" (perplexity of each text; accuracy of last words), "tasks" (all of the suite's figures), "drift" (of each block's activations), "time"
    (which each quantization has anyway). Raises ValueError for a model or a text that will not do, before anything is run.
    """

    def __init__(self, model: str, evaluation: Evaluation, out: Path, progress: Progress, device: str = "auto") -> None:
        self._model, self._evaluation, self._out, self._progress = model, evaluation, out, progress
        self.folder = ModelFolder(models.resolve(model))
        require(self.folder.quantization is None, "paper", "model", "a float model", "a quantized one")
        self.folder.check_length("paper", evaluation.length, bos=leading_bos(self.folder.tokenizer) is not None)
        check_names("paper", "text", evaluation.texts)
        self._texts = {name: read_text(name) for name in evaluation.texts}
        self._words = Suite.read(list(evaluation.lambada), [], [], evaluation.limit)
        self._choices = Suite.read([], list(evaluation.choices), [], evaluation.limit)
        self._windows = {
            Path(name).name: text_windows(self.folder.tokenizer, text, evaluation.windows, evaluation.length) for name, text in self._texts.items()
        }
        self._device = device_of(device)
        self._dtype = compute_dtype("auto", self._device)
        self._calibrations: dict[str, Callable[[Progress], Calibration]] = {}
        self._last_text: tuple[str, Calibration] | None = None

    @cached_property
    def _identity(self) -> list[Any]:
        """What every result depends on beside the quantization."""
        files = (*self._evaluation.lambada, *self._evaluation.choices)
        contents = [hashlib.sha256(text.encode()).hexdigest() for text in self._texts.values()] + [_digest(path) for path in files]
        evaluation = self._evaluation
        place = [version("normtweak"), self.folder.digest(), self._device.type]
        return [*place, evaluation.windows, evaluation.length, evaluation.limit, list(self._windows), contents]

    @cached_property
    def _float(self) -> Any:
        return models.load(self.folder.path, device=self._device)

    @cached_property
    def _float_statistics(self) -> Any:
        return channel_statistics(self._float, self._drift_windows, self._dtype, self._progress)

    @property
    def _drift_windows(self) -> Tensor:
        return next(iter(self._windows.values()))[:DRIFT_WINDOWS]

    def check(self, config: QuantizeConfig, seed: int) -> None:
        """Raise ValueError when the configuration's calibration text can't be had."""
        key = json.dumps([asdict(config.calibration), seed])
        if config.needs_calibration and key not in self._calibrations:
            self.folder.check_length("paper", config.calibration.length)
            self._calibrations[key] = calibration_text(self.folder, replace(config, seed=seed), self._device)

    def path(self, config: QuantizeConfig | None, seed: int) -> Path:
        """The file of a quantization's results."""
        settings = None if config is None else replace(config, seed=seed).to_dict()
        source = Path(config.calibration.source) if config else None
        content = _digest(source) if source and source.is_file() else None
        key = hashlib.sha256(json.dumps([self._identity, settings, content]).encode()).hexdigest()[:16]
        return self._out / "cells" / f"{key}.json"

    def results(self, config: QuantizeConfig | None, seed: int, measures: tuple[str, ...]) -> dict[str, dict[str, float]]:
        """Figures by measure and name, taken from the folder where they were measured before. The float model has no "time"."""
        path = self.path(config, seed)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {"measures": {}}
        missing = [measure for measure in measures if measure not in found["measures"]]
        if missing:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = self._measure_float(missing) if config is None else self._quantize(replace(config, seed=seed), missing)
            found = {"seed": seed, "config": config.to_dict() if config else None, "measures": found["measures"] | new}
            write_json(path, found)
        return {measure: found["measures"][measure] for measure in measures}

    def _quantize(self, config: QuantizeConfig, measures: list[str]) -> dict[str, dict[str, float]]:
        tokens = self._tokens(config)
        out = self._out / "quantized"
        if out.exists():
            logger.info("removing %s, which an interrupted run left", out)
            shutil.rmtree(out)
        began, wall = time.process_time(), time.perf_counter()
        quantize(self._model, out=out, config=config, tokens=tokens, progress=self._progress, device=str(self._device))
        spent = {"CPU seconds": time.process_time() - began, "seconds": time.perf_counter() - wall}
        try:
            return self._measure(models.load(out, device=self._device), measures) | {"time": spent}
        finally:
            shutil.rmtree(out)

    def _tokens(self, config: QuantizeConfig) -> Tensor | None:
        if not config.needs_calibration:
            return None
        self.check(config, config.seed)
        key = json.dumps([asdict(config.calibration), config.seed])
        if self._last_text is None or self._last_text[0] != key:
            self._last_text = key, self._calibrations[key](self._progress)
        return self._last_text[1].tokens

    def _measure_float(self, measures: list[str]) -> dict[str, dict[str, float]]:
        return self._measure(self._float, measures)

    def _measure(self, model: Any, measures: list[str]) -> dict[str, dict[str, float]]:
        values: dict[str, dict[str, float]] = {}
        tokenizer, settings = self.folder.tokenizer, _Settings(dtype=self._dtype, progress=self._progress)
        words = _figures(self._words, model, tokenizer, settings) if {"quality", "tasks"} & set(measures) else {}
        if "quality" in measures:
            scores = {name: score(model, tokenizer, windows, **settings).perplexity for name, windows in self._windows.items()}
            values["quality"] = {f"{name} perplexity": value for name, value in scores.items()} | words
        if "tasks" in measures:
            values["tasks"] = words | _figures(self._choices, model, tokenizer, settings)
        if "drift" in measures:
            own = channel_statistics(model, self._drift_windows, self._dtype, self._progress)
            values["drift"] = drift(own, self._float_statistics)
        return values


def _figures(suite: Suite, model: Any, tokenizer: Any, settings: _Settings) -> dict[str, float]:
    return {f"{row.task} {row.metric}": row.value.value for row in suite.run(model, tokenizer, **settings)} if suite else {}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
