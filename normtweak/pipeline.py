"""One run end to end: check everything, calibration text, the loop, the packed checkpoint, the report."""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import card, families, formats, models, norms, quantizers
from .activations import Stream, compute_dtype, device_of, embed_all
from .blocks import BlockReader
from .calibration.quality import TextReport
from .checkpoint import QUANTIZE_CONFIG, RECIPE, CheckpointWriter, check_disk, check_out_folder
from .config import PolishConfig, QuantizeConfig, require, stored_bits
from .linear import PackedLinear, quantizable_linears
from .loop import BlockReport, quantize_blocks
from .memory import PeakMemory, release
from .models import ModelFolder
from .polish import PolishReport, polish
from .progress import Progress, Silent
from .sequences import calibration_text, joined, split_extra, wanted_sequences

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """What a run did. seconds: by stage. peak_memory: bytes above what the process held at the start. sizes in bytes. calibration: of the text it chose itself."""

    out: Path
    float_size: int = 0
    packed_size: int = 0
    peak_memory: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    blocks: list[BlockReport] = field(default_factory=list)
    polish: PolishReport | None = None
    calibration: TextReport | None = None

    @property
    def norms_moved(self) -> bool:
        """Whether tweak or polish left any norm otherwise than the quantizer did."""
        tweaked = any(block.rate for block in self.blocks) and not (self.polish and self.polish.undone)
        return tweaked or (self.polish is not None and self.polish.accepted)


@torch.inference_mode(False)
@torch.enable_grad()  # whatever the caller has switched off
def quantize(
    model: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    config: QuantizeConfig | None = None,
    tokens: Tensor | None = None,
    extra_tokens: Tensor | None = None,
    progress: Progress | None = None,
    device: str = "auto",
) -> Report:
    """Quantize MODEL (see `models.resolve`) into the new folder `out`, a checkpoint of format `config.format` with tweaked norms.

    tokens: token ids int64 [samples, length] to calibrate on; None takes what `config.calibration` names. extra_tokens: int64 [count, length], which the polish alone is given
    beside `tokens`; where `tokens` is None, `config.polish.extra_samples` says how many. device: where blocks are computed, "cpu",
    "cuda", "cuda:N" or "auto", a GPU where there is one; a block at a time is there, the activations of all sequences stay in the host's memory.
    Everything that can be wrong with the input is found before any heavy work: raises ValueError in one line. The folder appears when it is
    whole; an error or Ctrl-C leaves none.
    """
    config = config or QuantizeConfig.preset()
    progress = progress or Silent()
    out = Path(out)
    with PeakMemory() as memory:
        stages = _Stages()
        check_out_folder(out)
        folder = ModelFolder(models.resolve(model))
        plan = _Plan(folder, config, device_of(device))
        plan.check_disk(out)
        quantizers.find(config.method).check()
        sequences = wanted_sequences(config, tokens, extra_tokens)
        enough = config.polish is None or sequences > 1
        require(enough, "quantize", "polish", "given two sequences or more, as one is held out", sequences)
        report = Report(out, seconds=stages.seconds)
        take_text = None
        if tokens is not None:
            plan.check_tokens("quantize", tokens, extra_tokens)
        elif config.needs_calibration:
            folder.check_length("quantize", config.calibration.length)
            take_text = calibration_text(folder, config, plan.device)
        with CheckpointWriter(out, plan.blocks + 1) as writer:
            with stages("check"), progress.task("checking weights", len(folder.weights.names())) as advance:
                for _ in folder.weights.check_finite():
                    advance()
                if config.needs_calibration:
                    plan.check_calls()
            if take_text is not None:
                with stages("calibration"):
                    text = take_text(progress)
                    (tokens, extra_tokens), report.calibration = split_extra(text.tokens, config.polish), text.report
                    release()  # the whole float model, which wrote the text, goes before the blocks come
            with stages("blocks"):
                untweaked: dict[str, Tensor] = {}
                report.blocks, stream, float_hidden = _run_blocks(plan, tokens, extra_tokens, untweaked, writer, progress)
                _write_rest(plan, _quantize_head(plan, tokens, stream, progress), writer)
            del stream
            if config.polish and tokens is not None and float_hidden is not None:
                release()
                with stages("polish"):
                    report.polish = _polish(plan, config.polish, joined(tokens, extra_tokens), float_hidden, untweaked, writer, progress)
            report.float_size = plan.float_size
            recipe = _recipe(model, config, tokens, report) | {"sizes": {"packed": writer.size, "float": plan.float_size}}
            writer.write_json(RECIPE, recipe)
            writer.write_text(card.FILE, card.render(recipe, plan.format.settings))
            writer.finish()
    report.packed_size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    report.peak_memory = memory.peak
    return report


class _Stages:
    """Wall-clock seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> _Stages:
        self._name, self._began = name, time.perf_counter()
        return self

    def __enter__(self) -> None:
        self.seconds[self._name] = 0.0

    def __exit__(self, *error: object) -> None:
        self.seconds[self._name] = time.perf_counter() - self._began


class _Plan(BlockReader):
    """What a configuration means for a model; raises ValueError where they don't fit."""

    def __init__(self, folder: ModelFolder, config: QuantizeConfig, device: torch.device) -> None:
        require(
            folder.quantization is None, "quantize", "model", "a float model", f"one quantized by {(folder.quantization or {}).get('quant_method')}"
        )
        super().__init__(folder, device)
        self.precision = compute_dtype(config.compute_dtype, device)
        require(self.blocks > 0, "quantize", "model", "one with at least one block", "none")
        self.stored_dtype = _stored_dtype(folder)
        self.family = families.find(folder.config)
        self.config = replace(config, skip=(*config.skip, *(self.family.keep if self.family else ())))
        linears = [f"{self.path}.{name}" for name in quantizable_linears(self.modules)]
        require(bool(linears), "quantize", self.path, "a list of blocks with nn.Linear modules", "none")
        if config.lm_head:
            head = self.model.get_submodule(self.head) if self.head else None
            require(isinstance(head, nn.Linear), "quantize", "lm_head", "off for a model without an output head that is an nn.Linear", "on")
            linears.append(str(self.head))
        _check_patterns(config, linears)
        # each packed linear's own settings, by its path in the model
        self.packed = {name: own for name in linears if (own := self.config.for_module(name))}
        require(bool(self.packed), "quantize", "skip", "patterns that leave some linear to be quantized", config.skip)
        for name, own in self.packed.items():
            k = self.model.get_submodule(name).in_features
            fits = own.group_size == -1 or k % own.group_size == 0
            require(fits, "quantize", "group_size", f"a divisor of {name}'s {k} input features", own.group_size)
        self.format = formats.open_format(self._quantization())
        self._check_parameters()

    def _quantization(self) -> dict[str, Any]:
        schemes = {name: formats.Scheme(stored_bits(own.bits), own.group_size, own.symmetric) for name, own in self.packed.items()}
        plain = [name for name in quantizable_linears(self.model) if name not in schemes]
        own = self.config
        meta = {
            "quantizer": [f"normtweak:{version('normtweak')}"],
            "damp_percent": own.damp_percent,
            "act_order": own.act_order,
            "static_groups": True,
        } | ({} if own.packed_activations == "auto" else {"activations": own.packed_activations})
        return formats.describe(own.written_format, schemes, plain, head=self.head, meta=meta)

    def _check_parameters(self) -> None:
        _ = self.folder.tokenizer, self.folder.generation  # written at the end, whether a text is looked at or not
        missing = self.folder.missing(self.model)
        require(
            not missing, "checkpoint", str(self.folder.path), f"a checkpoint with the parameter {missing[:1] and missing[0]}", "none of that name"
        )
        for name, tensor in self.model.state_dict().items():
            stored = self.folder.weights.find(name)
            if stored is not None:
                shape = self.folder.weights.shape(stored)
                require(shape == tuple(tensor.shape), "checkpoint", stored, f"of shape {tuple(tensor.shape)}", shape)

    @cached_property
    def float_size(self) -> int:
        """Bytes of the model in 16 bits."""
        return 2 * sum(p.numel() for name, p in self.model.state_dict().items() if name not in self.tied)

    def packed_size(self) -> int:
        """Bytes of the checkpoint to be written."""
        size = self.float_size
        for name, own in self.packed.items():
            linear = self.model.get_submodule(name)
            n, k = linear.out_features, linear.in_features
            groups = 1 if own.group_size == -1 else k // own.group_size
            bits = stored_bits(own.bits)
            size += n * k * bits // 8 + groups * n * (16 + bits) // 8 + 4 * k
            size -= 0 if f"{name}.weight" in self.tied else 2 * n * k
        return size

    def check_disk(self, out: Path) -> None:
        """Raise ValueError when the folder won't fit on its disk."""
        check_disk("quantize", out, self.packed_size())

    def open_head(self) -> nn.Linear:
        """The output head with its float weights, float32; a tied one's are the embedding's."""
        head = self.model.get_output_embeddings()
        weight = f"{self.head}.weight"
        source = self.model._tied_weights_keys[weight] if weight in self.tied else weight
        read, find = self.folder.weights.read, self.folder.weights.find
        values = {"weight": read(str(find(source)))} | ({} if head.bias is None else {"bias": read(str(find(f"{self.head}.bias")))})
        head.load_state_dict(values, assign=True)
        return head.float().requires_grad_(False)

    def written_name(self, name: str) -> str:
        """What the new checkpoint calls a tensor of the model: what the float checkpoint's files do, where they differ from today's modules."""
        return self.folder.weights.written(name)

    def written_packed(self, name: str, module: PackedLinear) -> dict[str, Tensor]:
        """A packed linear's tensors by their names in the checkpoint."""
        prefix = self.written_name(f"{name}.weight").removesuffix("weight")
        return {prefix + leaf: tensor for leaf, tensor in self.format.write(name, module).items()}


def _check_patterns(config: QuantizeConfig, names: list[str]) -> None:
    """Raise ValueError for a pattern that no linear's path has: a slip of the pen that would otherwise go unseen."""
    for argument, patterns in (("skip", config.skip), ("overrides", [own.pattern for own in config.overrides])):
        for pattern in patterns:
            found = any(re.search(pattern, name) for name in names)
            require(found, "quantize", argument, f"patterns found in a linear's path (as in {names[0]})", f"{pattern!r}, found in none")


def _stored_dtype(folder: ModelFolder) -> torch.dtype:
    # float32 checkpoints hold their embeddings in float16 afterwards: what isn't packed should not outweigh what is
    return folder.config.dtype if folder.config.dtype in (torch.float16, torch.bfloat16) else torch.float16


# What happened to each block; the stream behind the last; the float model's own hidden states there, [S, L, H], of the extra sequences too.
_Blocks = tuple[list[BlockReport], Stream | None, Tensor | None]


def _run_blocks(
    plan: _Plan, tokens: Tensor | None, extra_tokens: Tensor | None, untweaked: dict[str, Tensor], writer: CheckpointWriter, progress: Progress
) -> _Blocks:
    """Every block quantized, tweaked and written. untweaked: is given the norms of tweaked blocks from before, by name."""
    config = plan.config
    stream = extra = None
    if tokens is not None:
        size, tweaked = config.calibration.batch_size, config.tweak.batch_size if config.tweak else 0
        with plan.entrance() as calls:
            hidden = embed_all(calls, joined(tokens, extra_tokens), size, also=range(1, max(size, tweaked) + 1))
        stream = Stream(hidden[: len(tokens)], calls, size, plan.precision, plan.device)
        if config.polish and extra_tokens is not None:
            extra = stream.moved(hidden[len(tokens) :])

    def open_block(index: int) -> nn.Module:
        nonlocal extra
        block = plan.open_block(index)
        if extra is not None:
            extra = extra.moved(extra.through(block, index))
        return block

    def close_block(index: int, block: nn.Module, before: dict[str, Tensor]) -> None:
        place = f"{plan.path}.{index}."
        untweaked.update({place + name: value for name, value in before.items()})
        packed = {name: module for name, module in block.named_modules() if isinstance(module, PackedLinear)}
        tensors: dict[str, Tensor] = {}
        for name, module in packed.items():
            tensors |= plan.written_packed(place + name, module)
        for name, tensor in block.state_dict().items():
            if name.rpartition(".")[0] not in packed:
                tensors[plan.written_name(place + name)] = tensor
        # Steps of the tweak are finer than 16 bits: a gain near 1 moves by 2e-3, bfloat16's neighbours of 1 are 4e-3 and 8e-3 away.
        fine = {place + p.name for p in norms.norm_parameters(block, relative=True)} if config.changes_norms else set()
        # A router's correction decides between experts by differences of a thousandth.
        fine = {plan.written_name(name) for name in fine | {place + name for name, _ in block.named_buffers()}}
        writer.write(index, {name: tensor if name in fine else _stored(tensor, plan.stored_dtype) for name, tensor in tensors.items()})
        block.to("meta")

    reports, stream, float_stream = quantize_blocks(plan.path, plan.blocks, open_block, close_block, stream, config, progress, plan.family)
    if float_stream is None:
        return reports, stream, None
    return reports, stream, joined(float_stream.hidden, None if extra is None else extra.hidden)


def _quantize_head(plan: _Plan, tokens: Tensor | None, stream: Stream | None, progress: Progress) -> dict[str, Tensor]:
    """The output head's packed tensors by name, none when it isn't quantized. stream: what the last block gave for the tokens."""
    if plan.head not in plan.packed:
        return {}

    with plan.entrance() as calls, progress.task("quantizing the output head", 1) as advance, torch.no_grad():
        head = plan.open_head()

        def run(sequences: int | None = None) -> Tensor:
            if stream is None or tokens is None:
                raise ValueError("quantize: this method must be given calibration text, got none")
            calls.embed(tokens[:1])
            for rows in stream.starts():
                calls.leave(tokens[rows], stream.hidden[rows], head)
            return stream.hidden

        weight = quantizers.find(plan.config.method).quantize_block({plan.head: head}, run, plan.config)[plan.head]
        advance()
    return plan.written_packed(plan.head, PackedLinear.from_weight(weight, head.bias))


def _polish(
    plan: _Plan,
    config: PolishConfig,
    tokens: Tensor,
    float_hidden: Tensor,
    untweaked: dict[str, Tensor],
    writer: CheckpointWriter,
    progress: Progress,
) -> PolishReport:
    """Polish the norms of the checkpoint that has been written so far."""
    model = models.load(writer.partial, dtype=torch.float32, device=plan.device)
    blocks = model.get_submodule(plan.path)
    report, values = polish(
        model, blocks, tokens, float_hidden, config,
        dtype=plan.precision, seed=plan.config.seed, progress=progress, untweaked=untweaked,
    )  # fmt: skip
    if report.accepted or report.undone:
        writer.replace({plan.written_name(name): value for name, value in values.items()})
    return report


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.dtype in (torch.float64, torch.float32, torch.bfloat16) else tensor


def _write_rest(plan: _Plan, head: dict[str, Tensor], writer: CheckpointWriter) -> None:
    """Embeddings, final norm and head (packed tensors, or none), then configuration, tokenizer, generation settings."""
    weights = plan.folder.weights
    rest = {name: _stored(tensor, plan.stored_dtype) for name, tensor in head.items()}
    for name in plan.model.state_dict():
        if name.startswith(f"{plan.path}.") or name in plan.tied or name.rpartition(".")[0] in plan.packed:
            continue
        stored = weights.find(name)
        if stored is not None:
            rest[plan.written_name(name)] = _stored(weights.read(stored), plan.stored_dtype)
    writer.write(plan.blocks, rest)
    quantization = plan.format.settings
    settings = plan.folder.config.to_dict()
    settings |= {"dtype": str(plan.stored_dtype).removeprefix("torch."), "quantization_config": quantization}
    # transformers' server finds the model's class by it, and what GGUF files say lacks it
    settings["architectures"] = settings.get("architectures") or [type(plan.model).__name__]
    if head:  # packed codes are no embedding
        settings["tie_word_embeddings"] = False
    writer.write_json("config.json", settings)
    if quantization["quant_method"] == "gptq":
        writer.write_json(QUANTIZE_CONFIG, quantization)
    plan.folder.tokenizer.save_pretrained(writer.partial)
    if (plan.folder.path / "generation_config.json").is_file():
        shutil.copyfile(plan.folder.path / "generation_config.json", writer.partial / "generation_config.json")


def _recipe(model: str | os.PathLike[str], config: QuantizeConfig, tokens: Tensor | None, report: Report) -> dict[str, Any]:
    packages = {name: version(name) for name in ("normtweak", "torch", "transformers", "safetensors")}
    return {
        "model": os.fspath(model),
        "config": config.to_dict(),
        "calibration_tokens": None if tokens is None else tokens.numel(),
        "calibration": asdict(report.calibration) if report.calibration else None,
        "blocks": [asdict(block) for block in report.blocks],
        "polish": asdict(report.polish) if report.polish else None,
        "seconds": report.seconds,
        "packages": packages | {"python": platform.python_version()},
    }
