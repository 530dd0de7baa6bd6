"""What a model folder holds, for `normtweak inspect`."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

import torch

from normtweak_kernels import native, which_backend

from . import families, formats, models
from .checkpoint import read_recipe, stored_activations
from .linear import quantizable_linears
from .norms import is_norm


@dataclass(frozen=True)
class Section:
    """A titled list of (name, value)."""

    title: str
    rows: list[tuple[str, str]]


def describe(model: str | os.PathLike[str]) -> list[Section]:
    """Sections about a float or packed model, read from its headers alone: no weight is loaded."""
    folder = models.ModelFolder(models.resolve(model))
    skeleton = folder.skeleton()
    path = models.present_blocks(skeleton)
    blocks = skeleton.get_submodule(path)
    family = families.find(folder.config)
    parameters = sum(p.numel() for p in skeleton.parameters())
    size = sum(file.stat().st_size for file in folder.path.glob("*.safetensors"))
    shapes = Counter(f"{linear.out_features} x {linear.in_features}" for linear in quantizable_linears(blocks[0]).values())
    norms = [f"{name} ({type(module).__name__})" for name, module in blocks[0].named_modules() if is_norm(module)]
    sections = [
        Section(
            str(folder.path),
            [
                ("family", f"{folder.config.model_type} ({'known' if family else 'found by discovery'})"),
                ("parameters", f"{parameters:,}"),
                ("size on disk", f"{size / 1e6:.1f} MB"),
                ("blocks", f"{len(blocks)} at {path}"),
                ("linears of a block", ", ".join(f"{count} of {shape}" for shape, count in shapes.items())),
                ("norms of a block", ", ".join(norms)),
            ],
        )
    ]
    settings = folder.quantization
    if settings is not None:
        rows: list[tuple[str, str]] = [
            (key, str(settings[key]))
            for key in ("quant_method", "checkpoint_format", "packing_format", "format", "desc_act", "lm_head")
            if key in settings
        ]
        form = formats.open_format(settings)
        schemes = Counter(form.scheme(name) for name in models.packed_linears(skeleton, folder, form))
        rows.append(("packed linears", ", ".join(f"{count} of {scheme}" for scheme, count in schemes.most_common())))
        rows.append(("activations", stored_activations(settings)))
        sections.append(Section("quantization", rows))
    recipe = read_recipe(folder.path)
    if recipe is not None and "config" in recipe:  # else the codes are somebody else's
        rows = [("of", recipe["model"])]
        rows += [(key, str(value)) for key, value in recipe["config"].items()]
        rows += [("packages", ", ".join(f"{name} {number}" for name, number in recipe["packages"].items()))]
        sections.append(Section("recipe", rows))
    if recipe is not None and "retweak" in recipe:
        rows = [(key, str(value)) for key, value in recipe["retweak"]["config"].items()]
        sections.append(Section("norms tweaked afterwards", rows))
    sections.append(Section("kernels here", _kernels()))
    return sections


def _kernels() -> list[tuple[str, str]]:
    x, scales = torch.zeros(1, 32), torch.ones(1, 16)
    packed = torch.zeros(1, 4, 16, dtype=torch.int32)
    rows = [("dequant_gemm on cpu", which_backend("dequant_gemm", x, packed, scales, None, None, 4, "auto"))]
    if native.why_missing():
        rows.append(("native module", native.why_missing()))
    return rows
