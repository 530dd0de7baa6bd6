"""What normtweak knows of model families: data only, one file each. A model outside the table works by discovery (`norms.py`, `activations.py`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts.

    model_types: `config.model_type` values. blocks: path of the `nn.ModuleList` of decoder blocks.
    """

    model_types: tuple[str, ...]
    blocks: str


def find(model_type: str) -> Family | None:
    """The family of a `config.model_type`, or None when the table has no such entry."""
    from . import llama

    return next((family for family in (llama.FAMILY,) if model_type in family.model_types), None)
