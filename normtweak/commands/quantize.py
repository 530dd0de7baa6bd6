"""`normtweak quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..terminal import Device, Model, TerminalProgress, console
from . import options


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="New folder for the packed checkpoint.", show_default=False)],
    bits: Annotated[int | None, typer.Option(help="2, 3, 4, 5 (stored in 8) or 8.", show_default="4")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale (32, 64, 128, ...), or -1: one scale per output row.", show_default="-1")
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Store zero points; worth it at 2 bits.")] = False,
    method: Annotated[
        str | None, typer.Option(help="gptq, rtn, awq, smoothquant (activations int8) or autoround (extra: autoround).", show_default="gptq")
    ] = None,
    rounding: Annotated[
        str | None, typer.Option(help="What awq and smoothquant round with once their scales are found: nearest or gptq.", show_default="nearest")
    ] = None,
    preset: Annotated[str, typer.Option(help="default (best measured recipe) or paper (Algorithm 1 to the letter).")] = "default",
    module: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=BITS[:GROUP_SIZE]",
            help="Other bits for linears whose path has this regular expression in it; repeatable.",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave linears whose path has this in it as they are; repeatable.", show_default=False)
    ] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Quantize the output head too.")] = False,
    no_tweak: Annotated[bool, typer.Option("--no-tweak", help="Leave the norms as they are: no tweak, no polish.")] = False,
    no_polish: Annotated[bool, typer.Option("--no-polish", help="Tweak block by block alone, as the paper does.")] = False,
    loss: Annotated[str | None, typer.Option(help="The tweak's: channel, channel_squared, token_mse, mse or kl.", show_default="token_mse")] = None,
    iterations: Annotated[int | None, typer.Option(help="The tweak's passes over the calibration text.", show_default="1")] = None,
    lr: Annotated[float | None, typer.Option(help="The tweak's learning rate.", show_default="by bits")] = None,
    lr_search: Annotated[
        bool, typer.Option("--lr-search", help="Find the learning rates of each block's tweak and of the polish on held-out calibration text.")
    ] = False,
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
    form: Annotated[
        str | None, typer.Option("--format", help="gptq, gptq_v2 or compressed-tensors.", show_default="gptq; gptq_v2 with --asymmetric")
    ] = None,
    seed: options.Seed = None,
    device: Device = "auto",
    config: Annotated[Path | None, typer.Option(help="JSON file of QuantizeConfig settings; options given here win.", show_default=False)] = None,
) -> None:
    """Quantize MODEL block by block, tweak each block's norms, polish them all together, write a packed checkpoint."""
    from .. import pipeline
    from ..config import ModuleOverride, QuantizeConfig, require

    settings = options.read_settings("quantize", config)
    given = {"bits": bits, "group_size": group_size, "symmetric": False if asymmetric else None, "method": method}
    given |= {"rounding": rounding, "format": form, "seed": seed}
    settings |= {key: value for key, value in given.items() if value is not None}
    if module:
        settings["overrides"] = [ModuleOverride.parse(entry) for entry in module]
    if skip:
        settings["skip"] = skip
    if lm_head:
        settings["lm_head"] = True
    text = {"source": calibration, "languages": languages, "words": words, "field": field, "subset": subset, "split": split, "chat": chat}
    settings |= options.calibration_settings(settings, text | {"samples": samples, "length": length}, no_cache=no_cache)
    require(lr is None or not lr_search, "quantize", "lr", "left out with --lr-search", lr)
    schedule: dict[str, Any] = {
        key: value for key, value in {"loss": loss, "iterations": iterations, "learning_rate": lr}.items() if value is not None
    }
    if lr_search:
        schedule["learning_rate"] = None
        if preset == "default" and settings.get("polish", {}) is not None:
            settings["polish"] = {**options.table(settings, "polish"), "learning_rate": None}
    if extra_samples is not None:
        polished = not (no_tweak or no_polish) and preset == "default"
        require(polished, "quantize", "extra_samples", "left out where nothing is polished", extra_samples)
        settings["polish"] = {**options.table(settings, "polish"), "extra_samples": extra_samples}
    if schedule:
        require(not no_tweak, "quantize", ", ".join(schedule), "left out with --no-tweak", "given")
        settings["tweak"] = {**options.table(settings, "tweak"), **schedule}
    if no_tweak:
        settings["tweak"] = None
    if no_tweak or no_polish:
        settings["polish"] = None
    report = pipeline.quantize(model, out=out, config=QuantizeConfig.preset(preset, **settings), progress=TerminalProgress(), device=device)
    if report.calibration:
        console.out(str(report.calibration))
    if report.polish:
        console.out(f"polish: {report.polish}")
    console.out(
        f"{report.out}: {report.packed_size / 1e6:.1f} MB (16-bit: {report.float_size / 1e6:.1f} MB), "
        f"{sum(report.seconds.values()):.0f} s, peak memory {report.peak_memory / 1e9:.2f} GB above the start",
    )
