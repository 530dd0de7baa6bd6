"""What normtweak knows of model families: data only, one file each. A model outside the table works by discovery (`norms.py`, `activations.py`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

# What checkpoints call an expert's gate, up and down weights unless a family says otherwise.
EXPERTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Norm:
    """A norm inside a block, and what reads its output.

    path: of the norm in the block. feeds: paths of all modules that read the norm's output, `*` standing for any expert's number. Each has a weight [out, in], so
    norm / s and weight * s (by input channel) leave the block as it is. None where no such scale can be folded, because
    something else reads the output: the residual stream, the attention scores.
    """

    path: str
    feeds: tuple[str, ...] | None


@dataclass(frozen=True)
class Pair:
    """Two linears of one module: what the first makes reaches the second's input channel by channel, through nothing but products and sums over tokens.

    module: its path in the block, `*` standing for any expert's number. source, reader: their names in it. So source / s (by row) and reader * s (by input channel)
    leave the block as it is, where they have equally many channels.
    """

    module: str
    source: str
    reader: str


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts.

    model_types: `config.model_type` values. blocks: path of the `nn.ModuleList` of decoder blocks. norms: those of a block; paths that a block lacks
    don't count. final_norm: path of the norm behind the last block, embedding_norm: of one before the first; None where there is none.
    pairs: linears that a scale can move between.
    experts: what checkpoints call an expert's gate, up and down weights. keep: patterns of linears that are never quantized (routers, gates).
    when: settings of the model's configuration, name and value, that this entry needs.
    """

    model_types: tuple[str, ...]
    blocks: str
    norms: tuple[Norm, ...]
    final_norm: str | None
    embedding_norm: str | None = None
    pairs: tuple[Pair, ...] = ()
    experts: tuple[str, str, str] = EXPERTS
    keep: tuple[str, ...] = ()
    when: tuple[tuple[str, Any], ...] = ()

    def feeds(self, modules: Iterable[str]) -> dict[str, tuple[str, ...] | None]:
        """Each norm's readers in a block that has `modules` (paths), None where no scale can be folded."""
        modules = tuple(modules)
        return {norm.path: _expand(norm.feeds, modules) for norm in self.norms if norm.path in modules}

    def followers(self, modules: Iterable[str]) -> list[tuple[str, str]]:
        """The pairs (source, reader) in a block that has `modules` (paths)."""
        modules = tuple(modules)
        found = [(f"{m}.{pair.source}", f"{m}.{pair.reader}") for pair in self.pairs for m in modules if fnmatchcase(m, pair.module)]
        return [pair for pair in found if set(pair) <= set(modules)]


def _expand(patterns: tuple[str, ...] | None, modules: tuple[str, ...]) -> tuple[str, ...] | None:
    return None if patterns is None else tuple(m for m in modules if any(fnmatchcase(m, pattern) for pattern in patterns))


def find(config: Any) -> Family | None:
    """The family of a model's configuration, or None when the table has no such entry."""
    from . import bloom, falcon, gemma, glm, gpt2, gpt_neox, llama, mixtral, opt, phi, qwen3, qwen_moe

    files = (bloom, falcon, gemma, glm, gpt2, gpt_neox, llama, mixtral, opt, phi, qwen3, qwen_moe)
    entries = (family for file in files for family in file.FAMILIES if config.model_type in family.model_types)
    return next((family for family in entries if all(getattr(config, name, None) == value for name, value in family.when)), None)
