"""Better norms for a packed checkpoint, whoever made it: Algorithm 1's tweak (loop.py) and the polish through the packed linears, which stay as they are."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import card, formats, models, norms
from .activations import Stream, compute_dtype, device_of, embed_all
from .blocks import BlockReader, PackedReader
from .calibration.quality import TextReport
from .checkpoint import RECIPE, CheckpointWriter, check_disk, check_out_folder, other_files, read_recipe
from .config import RetweakConfig, require
from .linear import quantizable_linears
from .loop import BlockReport, tweak_block
from .memory import PeakMemory, release
from .models import ModelFolder
from .polish import PolishReport, polish
from .progress import Progress, Silent
from .sequences import calibration_text, joined, split_extra, wanted_sequences

# Rounding to bfloat16 moves an embedding by 0.2 %; a fine-tuned model may be nearer to its base than this, an unrelated one is 140 % away.
SAME = 0.01


@dataclass
class RetweakReport:
    """What a run did. changed: names of the tensors that differ from the old checkpoint's. peak_memory: bytes above what the process held at the start. calibration: of the text it
    chose itself."""

    out: Path
    blocks: list[BlockReport] = field(default_factory=list)
    polish: PolishReport | None = None
    changed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory: int = 0
    calibration: TextReport | None = None


@torch.inference_mode(False)
@torch.enable_grad()  # whatever the caller has switched off
def tweak(
    quantized: str | os.PathLike[str],
    *,
    float_model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: RetweakConfig | None = None,
    tokens: Tensor | None = None,
    extra_tokens: Tensor | None = None,
    progress: Progress | None = None,
    device: str = "auto",
) -> RetweakReport:
    """Tweak and polish the norms of the packed checkpoint `quantized`, of any format that `normtweak.load` reads, into the new folder `out`.

    float_model: what it was quantized from. tokens: ids int64 [samples, length] to calibrate on; None takes what `config.calibration` names. extra_tokens: for the polish alone,
    see `quantize`. device: where blocks are computed, see `quantize`. Norms that get better are written, in float32; every other tensor and file is copied as it is. Raises ValueError in one line, before any heavy work, where the
    two models don't belong together.
    """
    out, progress = Path(out), progress or Silent()
    began = time.perf_counter()
    with PeakMemory() as memory:
        check_out_folder(out)
        place = device_of(device)
        packed = PackedReader(ModelFolder(models.resolve(quantized)), place)
        exact = BlockReader(ModelFolder(models.resolve(float_model)), place)
        _check_pair(packed, exact)
        config = config or preset_for(quantized)
        sequences = wanted_sequences(config, tokens, extra_tokens)
        require(config.polish is None or sequences > 1, "tweak", "polish", "given two sequences or more, as one is held out", sequences)
        if tokens is not None:
            exact.check_tokens("tweak", tokens, extra_tokens)
        exact.folder.check_length("tweak", config.calibration.length if tokens is None else tokens.shape[1])
        take_text = calibration_text(exact.folder, config, place) if tokens is None else None
        exact.check_calls()
        check_disk("tweak", out, sum(path.stat().st_size for path in packed.folder.path.glob("*.safetensors")))
        report = RetweakReport(out)
        with CheckpointWriter(out, len(packed.folder.weights.by_file())) as writer:
            if take_text is not None:
                text = take_text(progress)
                (tokens, extra_tokens), report.calibration = split_extra(text.tokens, config.polish), text.report
                release()  # the whole float model, which wrote the text, goes before the blocks come
            assert tokens is not None
            everything = joined(tokens, extra_tokens)
            values, float_hidden = _tweak_blocks(packed, exact, everything, len(tokens), config, report, progress)
            if config.polish:
                release()
                values = _polish(packed, exact, values, everything, float_hidden, config, report, progress)
            report.changed = sorted(values)
            _write(packed.folder, values, writer)
            _write_notes(packed.folder, config, tokens, report, writer)
            writer.finish()
    report.seconds, report.peak_memory = time.perf_counter() - began, memory.peak
    return report


def preset_for(quantized: str | os.PathLike[str], **settings: Any) -> RetweakConfig:
    """The best recipe measured for the fewest bits that a packed checkpoint has, with some settings replaced; see RetweakConfig.preset."""
    folder = ModelFolder(models.resolve(quantized))
    require(folder.quantization is not None, "tweak", str(quantized), "a packed checkpoint", "a float model")
    form = formats.open_format(folder.quantization or {})
    schemes = map(form.scheme, models.packed_linears(folder.skeleton(), folder, form))
    return RetweakConfig.preset(min(scheme.bits for scheme in schemes if scheme), **settings)


def _check_pair(packed: PackedReader, exact: BlockReader) -> None:
    path = str(exact.folder.path)
    require(
        exact.folder.quantization is None,
        "tweak",
        "float",
        "a float model",
        f"one quantized by {(exact.folder.quantization or {}).get('quant_method')}",
    )
    packed.folder.check_same_vocabulary("tweak", exact.folder)
    shapes = [{name: tuple(linear.weight.shape) for name, linear in quantizable_linears(reader.model).items()} for reader in (packed, exact)]
    odd = next((name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)), None)
    require(odd is None, "tweak", "float", f"the model that was quantized, with {odd} of {shapes[0].get(odd or '')}", shapes[1].get(odd or ""))
    codes = {f"{name}.weight" for name in packed.linears}
    for reader, elsewhere in ((packed, codes), (exact, set())):
        missing = [name for name in reader.folder.missing(reader.model) if name not in elsewhere]
        require(
            not missing, "checkpoint", str(reader.folder.path), f"a checkpoint with the parameter {missing[:1] and missing[0]}", "none of that name"
        )
    require(exact.blocks > 0, "tweak", path, "a model with at least one block", "none")
    distance = _embedding_distance(packed, exact)
    require(distance < SAME, "tweak", "float", "the model that was quantized, with its embedding", f"one whose embedding differs by {distance:.0%}")


def _embedding_distance(packed: PackedReader, exact: BlockReader) -> float:
    """|E - F| / |F| of the first rows of the two models' embeddings, which no quantizer changes: shapes don't tell a model from its namesakes."""
    rows = []
    for reader in (packed, exact):
        weight = reader.model.get_input_embeddings().weight
        name = next(name for name, parameter in reader.model.named_parameters() if parameter is weight)
        rows.append(reader.folder.weights.read(str(reader.folder.weights.find(name)))[:1024].float())
    return ((rows[0] - rows[1]).norm() / rows[1].norm()).item()


def _tweak_blocks(
    packed: PackedReader, exact: BlockReader, tokens: Tensor, tweaked: int, config: RetweakConfig, report: RetweakReport, progress: Progress
) -> tuple[dict[str, Tensor], Tensor]:
    """The norms that the tweak changed, by name, and what the float model's last block gives. tweaked: how many sequences the tweak looks at, the first ones."""
    chosen, size, precision = config.tweak, config.calibration.batch_size, compute_dtype(config.compute_dtype, exact.device)
    streams = []
    for reader in (packed, exact):
        with reader.entrance() as calls:
            hidden = embed_all(calls, tokens, size, also=range(1, (chosen.batch_size if chosen else 0) + 1))
        streams.append(Stream(hidden, calls, size, precision, reader.device))
    stream, float_stream = streams[0].first(tweaked), streams[1]
    values: dict[str, Tensor] = {}
    with progress.task("tweaking" if chosen else "running the float model", exact.blocks) as advance:
        for index in range(exact.blocks):
            began = time.perf_counter()
            block = exact.open_block(index)
            float_output = float_stream.through(block, index)
            if chosen:
                target = float_output[:tweaked] if chosen.target_stream == "float" else stream.through(block, index)
                block.to("meta")
                block, place = packed.open_block(index), f"{packed.path}.{index}."
                start = {p.name: p.start for p in norms.norm_parameters(block, relative=True)}
                before, after, rate = tweak_block(block, index, packed.blocks, stream, target, chosen, config.seed)
                found = {name: block.get_parameter(name).detach() for name in start}
                values |= {place + name: value.clone() for name, value in found.items() if not torch.equal(value, start[name])}
                stream = stream.moved(stream.through(block, index))
                report.blocks.append(BlockReport(index, time.perf_counter() - began, before, after, rate))
            block.to("meta")
            float_stream = float_stream.moved(float_output)
            advance(str(report.blocks[-1]) if chosen else "")
    return values, float_stream.hidden


def _polish(
    packed: PackedReader, exact: BlockReader, values: dict[str, Tensor], tokens: Tensor, float_hidden: Tensor, config: RetweakConfig,
    report: RetweakReport, progress: Progress,
) -> dict[str, Tensor]:  # fmt: skip
    """The norms that tweak and polish changed, by name."""
    assert config.polish is not None
    model = models.load(packed.folder.path, dtype=torch.float32, device=packed.device)
    untweaked = {p.name: p.start for p in norms.norm_parameters(model, relative=True)}
    norms.assign(model, values)
    find, read = exact.folder.weights.find, exact.folder.weights.read
    behind = {name: read(str(find(name))).float().to(packed.device) for name in untweaked if not name.startswith(f"{packed.path}.")}
    report.polish, found = polish(
        model, model.get_submodule(packed.path), tokens, float_hidden, config.polish,
        dtype=compute_dtype(config.compute_dtype, packed.device), seed=config.seed, progress=progress, float_values=behind,
        untweaked={name: untweaked[name] for name in values},
    )  # fmt: skip
    return {name: value for name, value in found.items() if not torch.equal(value, untweaked[name])}


def _write(folder: ModelFolder, values: dict[str, Tensor], writer: CheckpointWriter) -> None:
    weights = folder.weights
    new = {weights.find(name): value for name, value in values.items()}
    for number, names in enumerate(weights.by_file().values()):
        writer.write(number, {weights.written(name): new[name] if name in new else weights.read(name) for name in names})


def _write_notes(folder: ModelFolder, config: RetweakConfig, tokens: Tensor, report: RetweakReport, writer: CheckpointWriter) -> None:
    ours = card.is_ours(folder.path)
    writer.copy(folder.path, [path for path in other_files(folder.path) if str(path) != RECIPE and not (ours and str(path) == card.FILE)])
    note = {
        "config": asdict(config),
        "calibration_tokens": tokens.numel(),
        "calibration": asdict(report.calibration) if report.calibration else None,
        "blocks": [asdict(block) for block in report.blocks],
        "polish": asdict(report.polish) if report.polish else None,
    }
    recipe = {**(read_recipe(folder.path) or {}), "retweak": note}
    writer.write_json(RECIPE, recipe)
    if ours or not (folder.path / card.FILE).is_file():
        writer.write_text(card.FILE, card.render(recipe, folder.quantization or {}))
