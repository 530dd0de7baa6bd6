"""`normtweak tweak`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import Device, TerminalProgress, console
from .options import (
    Chat,
    ExtraSamples,
    Field,
    Languages,
    Length,
    NoCache,
    Samples,
    Seed,
    Source,
    Split,
    Subset,
    Words,
    calibration_settings,
    read_settings,
    table,
)


def tweak(
    quantized: Annotated[
        str, typer.Argument(metavar="QUANTIZED", help="Packed checkpoint: GPTQ, AutoRound or compressed-tensors.", show_default=False)
    ],
    float_model: Annotated[str, typer.Option("--float", metavar="MODEL", help="What it was quantized from.", show_default=False)],
    out: Annotated[Path, typer.Option(help="New folder for the better checkpoint.", show_default=False)],
    no_polish: Annotated[bool, typer.Option("--no-polish", help="Tweak block by block alone.")] = False,
    polish_only: Annotated[bool, typer.Option("--polish-only", help="Polish all norms together, without the tweak block by block.")] = False,
    calibration: Source = None,
    languages: Languages = None,
    words: Words = None,
    field: Field = None,
    subset: Subset = None,
    split: Split = None,
    chat: Chat = False,
    no_cache: NoCache = False,
    samples: Samples = None,
    length: Length = None,
    extra_samples: ExtraSamples = None,
    seed: Seed = None,
    device: Device = "auto",
    config: Annotated[Path | None, typer.Option(help="JSON file of RetweakConfig settings; options given here win.", show_default=False)] = None,
) -> None:
    """Improve a packed checkpoint by its norms alone; its codes, every other tensor and file, and its format stay as they are."""
    from .. import retweak
    from ..config import require

    settings = read_settings("tweak", config) | ({} if seed is None else {"seed": seed})
    options = {"source": calibration, "languages": languages, "words": words, "field": field, "subset": subset, "split": split, "chat": chat}
    settings |= calibration_settings(settings, options | {"samples": samples, "length": length}, no_cache=no_cache)
    if extra_samples is not None:
        require(not no_polish, "tweak", "extra_samples", "left out with --no-polish", extra_samples)
        settings["polish"] = {**table(settings, "polish"), "extra_samples": extra_samples}
    settings |= ({"polish": None} if no_polish else {}) | ({"tweak": None} if polish_only else {})
    chosen = retweak.preset_for(quantized, **settings)
    report = retweak.tweak(quantized, float_model=float_model, out=out, config=chosen, progress=TerminalProgress(), device=device)
    if report.calibration:
        console.out(str(report.calibration))
    if report.polish:
        console.out(f"polish: {report.polish}")
    console.out(
        f"{report.out}: {len(report.changed)} norm tensors changed, {report.seconds:.0f} s, peak memory {report.peak_memory / 1e9:.2f} GB above the start",
    )
