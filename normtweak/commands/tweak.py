"""`normtweak tweak`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import Device, TerminalProgress, console
from .quantize import calibration_settings, read_settings, table


def tweak(
    quantized: Annotated[
        str, typer.Argument(metavar="QUANTIZED", help="Packed checkpoint: GPTQ, AutoRound or compressed-tensors.", show_default=False)
    ],
    float_model: Annotated[str, typer.Option("--float", metavar="MODEL", help="What it was quantized from.", show_default=False)],
    out: Annotated[Path, typer.Option(help="New folder for the better checkpoint.", show_default=False)],
    no_polish: Annotated[bool, typer.Option("--no-polish", help="Tweak block by block alone.")] = False,
    polish_only: Annotated[bool, typer.Option("--polish-only", help="Polish all norms together, without the tweak block by block.")] = False,
    calibration: Annotated[
        str | None,
        typer.Option(help="generated (by the float model), random, a UTF-8 text FILE.txt, FILE.jsonl, or hf:DATASET.", show_default="generated"),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.", show_default="64")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in each.", show_default="256")] = None,
    extra_samples: Annotated[
        int | None, typer.Option(help="Further sequences of the same text for the polish alone.", show_default="0; at 2 bits four times --samples")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same bytes.", show_default="0")] = None,
    device: Device = "auto",
    config: Annotated[Path | None, typer.Option(help="JSON file of RetweakConfig settings; options given here win.", show_default=False)] = None,
) -> None:
    """Improve a packed checkpoint by its norms alone; its codes, every other tensor and file, and its format stay as they are."""
    from .. import retweak
    from ..config import require

    settings = read_settings("tweak", config) | ({} if seed is None else {"seed": seed})
    settings |= calibration_settings(settings, {"source": calibration, "samples": samples, "length": length})
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
