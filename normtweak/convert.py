"""From one packed format to another, loss-free: the codes, scales and zeros in other tensors, all else as it is."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path

from . import card, formats, models
from .blocks import PackedReader
from .checkpoint import QUANTIZE_CONFIG, CheckpointWriter, check_disk, check_out_folder, other_files, read_recipe
from .linear import quantizable_linears
from .models import ModelFolder
from .progress import Progress, Silent


def convert(model: str | os.PathLike[str], *, out: str | os.PathLike[str], format: str, progress: Progress | None = None) -> int:
    """Write the packed checkpoint MODEL (see `models.resolve`; any format that `normtweak.load` reads) into the new folder `out` as `format`.

    format: "gptq", "gptq_v2" or "compressed-tensors". Codes, scales, zeros and every other tensor keep their bits; a file of the weights at a time is in memory.
    Returns the size in bytes. Raises ValueError in one line, before anything is written, for what the format can't hold.
    """
    out, progress = Path(out), progress or Silent()
    check_out_folder(out)
    folder = ModelFolder(models.resolve(model))
    source = PackedReader(folder)
    plain = [name for name in quantizable_linears(source.model) if name not in source.linears]
    grids = {
        name: source.format.grid(name, models.packed_tensors(folder, prefix, source.leaves), linear.out_features, linear.in_features)
        for name, (linear, prefix) in source.linears.items()
    }
    meta = source.format.settings.get("meta") or {"quantizer": [f"normtweak:{version('normtweak')}"]}
    meta = {**meta, "desc_act": any(perm is not None for _, _, perm in grids.values())}
    target = formats.open_format(formats.describe(format, source.schemes, plain, head=source.head, meta=meta))
    for name, grid in grids.items():
        target.check(name, *grid)
    del grids
    check_disk("convert", out, sum(path.stat().st_size for path in folder.path.glob("*.safetensors")))
    weights, leaves = folder.weights, (*source.format.leaves, "bias")
    packed = {prefix + leaf: name for name, (_, prefix) in source.linears.items() for leaf in leaves if weights.find(prefix + leaf)}
    files = weights.by_file()
    with CheckpointWriter(out, len(files)) as writer, progress.task("converting", len(files)) as advance:
        for number, names in enumerate(files.values()):
            tensors = {}
            for stored in names:
                if stored not in packed:
                    tensors[weights.written(stored)] = weights.read(stored)
                elif stored.endswith(source.format.codes):
                    prefix = weights.written(stored).removesuffix(source.format.codes)
                    linear = source.open_linear(packed[stored])
                    tensors |= {prefix + leaf: tensor for leaf, tensor in target.write(packed[stored], linear).items()}
            writer.write(number, tensors)
            advance()
        _write_settings(folder, target, writer)
        writer.finish()
        return writer.size


def _write_settings(folder: ModelFolder, target: formats.Format, writer: CheckpointWriter) -> None:
    own = ("config.json", QUANTIZE_CONFIG)
    ours = card.is_ours(folder.path)
    writer.copy(folder.path, [path for path in other_files(folder.path) if str(path) not in own and not (ours and str(path) == card.FILE)])
    settings = json.loads((folder.path / "config.json").read_text(encoding="utf8")) | {"quantization_config": target.settings}
    writer.write_json("config.json", settings)
    if target.settings["quant_method"] == "gptq":
        writer.write_json(QUANTIZE_CONFIG, target.settings)
    if ours or not (folder.path / card.FILE).is_file():
        writer.write_text(card.FILE, card.render(read_recipe(folder.path) or {}, target.settings))
