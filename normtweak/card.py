"""The model card, README.md of a written folder: what it holds, how it was made, what was measured, what loads it. Made from normtweak.json and the configuration alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import models
from .checkpoint import RECIPE, read_recipe, stored_activations, write_json, write_text
from .config import require

FILE = "README.md"
_MARK = "  - normtweak\n"


def is_ours(folder: Path) -> bool:
    """Whether a folder's card is one that normtweak wrote."""
    path = folder / FILE
    return path.is_file() and _MARK in path.read_text(encoding="utf8", errors="replace")


def render(recipe: Mapping[str, Any], quantization: Mapping[str, Any]) -> str:
    """The card's text. recipe: what normtweak.json holds, or nothing. quantization: `quantization_config` of config.json."""
    method = str(quantization.get("quant_method"))
    form = str(quantization.get("checkpoint_format", method)) if method == "gptq" else method
    bits, group_size, symmetric = _usual(quantization)
    base = _base_model(recipe)
    front = ["---", *([f"base_model: {json.dumps(base)}"] if base else []), "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    front += [_MARK.rstrip("\n"), f"  - {method}", f"  - {bits}-bit", "quantization:", f"  format: {form}", f"  bits: {bits}"]
    front += [f"  group_size: {group_size}", f"  symmetric: {str(symmetric).lower()}", "---"]
    groups = "a scale per output channel" if group_size == -1 else f"groups of {group_size}"
    kind = "symmetric" if symmetric else "asymmetric"
    activations = stored_activations(quantization)
    kept = "Activations aren't quantized." if activations == "auto" else f"Activations are rounded as they are multiplied ({activations})."
    lines = [*front, "", f"# {base or 'A packed model'}, {bits} bits", ""]
    lines += [f"{bits}-bit weights, {groups}, {kind}, in the format {form}. {kept} `config.json` says what differs by module."]
    return "\n".join([*lines, *_made(recipe), *_measured(recipe), *_loading(method, bits, symmetric)]) + "\n"


def add_scores(folder: Path, scores: Mapping[str, Any], against: str | None) -> None:
    """Note an evaluation's scores, by text, in a folder's normtweak.json and card. Raises ValueError for a folder that normtweak didn't write."""
    check_has_card(folder)
    recipe: dict[str, Any] = read_recipe(folder) or {}
    name = None if against is None else _name(against)
    recipe["scores"] = recipe.get("scores", {}) | {os.path.basename(text): {**score, "against": name} for text, score in scores.items()}
    quantization = json.loads((folder / "config.json").read_text(encoding="utf8"))["quantization_config"]
    write_json(folder / RECIPE, recipe)
    write_text(folder / FILE, render(recipe, quantization))


def check_has_card(folder: Path) -> None:
    """Raise ValueError unless a folder has a recipe, which a card is made from, and no card of somebody else's."""
    require(
        (folder / RECIPE).is_file() and (is_ours(folder) or not (folder / FILE).exists()),
        "card",
        str(folder),
        "a folder that normtweak wrote",
        "another",
    )


def _usual(quantization: Mapping[str, Any]) -> tuple[int, int, bool]:
    groups = quantization.get("config_groups")
    if groups:
        weights = next(iter(groups.values()))["weights"]
        size = weights.get("group_size")
        return weights.get("num_bits", 8), -1 if size is None else size, weights.get("symmetric", True)
    return quantization.get("bits", 0), quantization.get("group_size", -1), quantization.get("sym", True)


def _base_model(recipe: Mapping[str, Any]) -> str | None:
    return _name(recipe["model"]) if "model" in recipe else None


def _name(model: str) -> str:
    # a hub id is a name everywhere, a path on one machine alone
    if model == models.EMBEDDED:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return model if not os.path.exists(model) and model.count("/") == 1 and not model.endswith(".gguf") else Path(model.rpartition(":")[2]).name


def _made(recipe: Mapping[str, Any]) -> list[str]:
    if "config" not in recipe and "retweak" not in recipe:
        return []
    lines = ["", "## How it was made", ""]
    if config := recipe.get("config"):
        looked = config["method"] != "rtn"
        lines += [
            f"- codes: {config['method'].upper()}" + (_calibrated(recipe) if looked else ""),
            *_norms(recipe, "" if looked else _calibrated(recipe)),
        ]
    if again := recipe.get("retweak"):
        lines += ["- norms alone tweaked afterwards (`normtweak tweak`)" + _calibrated(again), *_norms(again)]
    sizes = recipe.get("sizes")
    lines += [f"- weights: {sizes['packed'] / 1e6:.1f} MB, {sizes['float'] / 1e6:.1f} MB in 16 bits"] if sizes else []
    packages = recipe.get("packages") or {}
    return [*lines, "- packages: " + ", ".join(f"{name} {number}" for name, number in packages.items())] if packages else lines


def _calibrated(run: Mapping[str, Any]) -> str:
    """On what text. run: a recipe, or its part of a later tweak."""
    config = run["config"]
    text = config["calibration"]
    if run.get("calibration") is None and (given := run.get("calibration_tokens")):
        return f", from {given} given tokens, seed {config['seed']}"
    source = text["source"] if text["source"] in ("generated", "random") else "given"
    return f", from {text['samples']} x {text['length']} tokens of {source} text, seed {config['seed']}"


def _norms(run: Mapping[str, Any], calibrated: str = "") -> list[str]:
    """What became of the norms. run: as in `_calibrated`."""
    lines = []
    config, polish, blocks = run["config"], run.get("polish") or {}, run.get("blocks") or []
    if tweak := config.get("tweak"):
        kept = sum(bool(block["rate"]) for block in blocks)
        fate = "undone, as the polish found" if polish.get("undone") else f"kept in {kept} of {len(blocks)} blocks"
        rate = tweak["learning_rate"] or "searched"
        lines.append(f"- norm tweaking (arXiv 2309.02784) block by block: loss {tweak['loss']}, learning rate {rate}{calibrated}; {fate}")
    if config.get("polish"):
        fate = "" if polish.get("accepted") else "; not kept"
        lines.append(f"- all norms polished together against the float model's next-token distribution{calibrated}{fate}")
    return lines


def _measured(recipe: Mapping[str, Any]) -> list[str]:
    lines = []
    for polish in (recipe.get("polish"), (recipe.get("retweak") or {}).get("polish")):
        if polish:
            kept = "" if polish["accepted"] else " (not kept)"
            lines.append(f"- KL to the float model per token of held-out calibration text, before and after the polish: "
                         f"{polish['kl_before']:.4f} -> {polish['kl_after']:.4f} nats{kept}")  # fmt: skip
    for text, score in (recipe.get("scores") or {}).items():
        beside = f", KL {score['kl']:.4f} to {score['against']}" if score.get("kl") is not None else ""
        lines.append(f"- perplexity on {text}: {score['perplexity']:.3f}{beside}")
    return ["", "## What was measured", "", *lines] if lines else []


def _loading(method: str, bits: int, symmetric: bool) -> list[str]:
    lines = [
        "",
        "## Loading it",
        "",
        "```python",
        "import normtweak",
        "",
        'model = normtweak.load("FOLDER")  # a transformers model; its linears stay packed',
        "```",
        "",
    ]
    if method == "gptq":
        lines += ["- transformers: `AutoModelForCausalLM.from_pretrained` after `import normtweak`, or with GPTQModel installed."]
        served = bits in (4, 8) and symmetric
        plugin = "with normtweak's plugin: vLLM itself reads symmetric 4 and 8 bits alone."
        return [*lines, "- vLLM: " + ("`vllm serve FOLDER`." if served else plugin)]
    if method == "compressed-tensors":
        lines += ["- transformers: `AutoModelForCausalLM.from_pretrained` with compressed-tensors installed, which decompresses the weights."]
        return [
            *lines,
            "- vLLM: `vllm serve FOLDER`."
            if bits in (4, 8)
            else "- vLLM: 4 and 8 bits alone; `normtweak convert --format gptq_v2` for normtweak's plugin.",
        ]
    return lines
