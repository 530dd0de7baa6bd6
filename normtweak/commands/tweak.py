"""`normtweak tweak`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import Device, TerminalProgress, console
from . import options


def tweak(
    quantized: Annotated[
        str, typer.Argument(metavar="QUANTIZED", help="Packed checkpoint: GPTQ, AutoRound or compressed-tensors.", show_default=False)
    ],
    float_model: Annotated[str, typer.Option("--float", metavar="MODEL", help="What it was quantized from.", show_default=False)],
    out: Annotated[Path, typer.Option(help="New folder for the better checkpoint.", show_default=False)],
    no_polish: Annotated[bool, typer.Option("--no-polish", help="Tweak block by block alone.")] = False,
    polish_only: Annotated[bool, typer.Option("--polish-only", help="Polish all norms together, without the tweak block by block.")] = False,
    calibration: options.Source = None,
    languages: options.Languages = None,
    words: options.Words = None,
    field: options.Field = None,
    subset: options.Subset = None,
    split: options.Split = None,
    chat: options.Chat = False,
    no_cache: options.NoCache = False,
    samples: options.Samples = None,
    length: options.Length = None,
    extra_samples: options.ExtraSamples = None,
    seed: options.Seed = None,
    device: Device = "auto",
    config: Annotated[Path | None, typer.Option(help="JSON file of RetweakConfig settings; options given here win.", show_default=False)] = None,
) -> None:
    """Improve a packed checkpoint by its norms alone; its codes, every other tensor and file, and its format stay as they are."""
    from .. import retweak
    from ..config import require

    settings = options.read_settings("tweak", config) | ({} if seed is None else {"seed": seed})
    text = {"source": calibration, "languages": languages, "words": words, "field": field, "subset": subset, "split": split, "chat": chat}
    settings |= options.calibration_settings(settings, text | {"samples": samples, "length": length}, no_cache=no_cache)
    if extra_samples is not None:
        require(not no_polish, "tweak", "extra_samples", "left out with --no-polish", extra_samples)
        settings["polish"] = {**options.table(settings, "polish"), "extra_samples": extra_samples}
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
