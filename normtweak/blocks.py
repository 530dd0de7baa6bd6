"""A model folder's decoder, read one block at a time: float blocks, or those of a packed checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import formats, models
from .activations import CPU, BlockCalls
from .attention import use_blockwise
from .checkpoint import stored_activations
from .config import require
from .linear import PackedLinear, replace
from .models import ModelFolder


class BlockReader:
    """The skeleton of a folder's model; its blocks, on a device, and what comes before them, in the host's memory, with weights while they are needed."""

    def __init__(self, folder: ModelFolder, device: torch.device = CPU) -> None:
        self.folder, self.device = folder, device
        self.model = folder.skeleton()
        use_blockwise(self.model, device)
        self.path = models.present_blocks(self.model)
        self.modules: nn.ModuleList = self.model.get_submodule(self.path)
        self.blocks = len(self.modules)
        self.head = next((name for name, module in self.model.named_modules() if module is self.model.get_output_embeddings()), None)
        self.tied = models.tied_names(self.model)

    def check_calls(self) -> None:
        """Raise ValueError when the model calls its blocks in a way that can't be repeated."""
        with self.entrance() as calls:
            calls.embed(torch.zeros(1, 4, dtype=torch.int64))
            calls.embed(torch.ones(1, 4, dtype=torch.int64))

    def check_tokens(self, where: str, tokens: Tensor, extra: Tensor | None = None) -> None:
        """Raise ValueError unless a user's own tokens can be calibrated on. extra: those for the polish alone."""
        vocabulary = self.folder.text_config.vocab_size
        for name, given in {"tokens": tokens, "extra_tokens": extra}.items():
            if given is None:
                continue
            good = given.dim() == 2 and given.dtype == torch.int64 and given.shape[0] >= 1 and given.shape[1] >= 2
            good = good and int(given.min()) >= 0 and int(given.max()) < vocabulary
            wanted = f"int64 [samples, length of 2 or more] of ids below {vocabulary}"
            require(good, where, name, wanted, f"{given.dtype} {tuple(given.shape)}")
            require(given.shape[1] == tokens.shape[1], where, name, f"of the tokens' length {tokens.shape[1]}", given.shape[1])
        self.folder.check_length(where, tokens.shape[1])

    @contextmanager
    def entrance(self) -> Iterator[BlockCalls]:
        """What comes before the first block, in float32, while open."""
        self.folder.weights.fill(self.model, skip=(f"{self.path}.", *self.tied, *([f"{self.head}."] if self.head else [])))
        blocks = set(self.modules.modules())
        outside = [m for m in self.model.modules() if m not in blocks and any(not p.is_meta for p in m.parameters(recurse=False))]
        for module in outside:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
        try:
            yield BlockCalls(self.model, self.modules)
        finally:
            for module in outside:
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def open_block(self, index: int) -> nn.Module:
        """Block `index` with its weights, those in floating point float32."""
        block = self.modules[index]
        self.folder.weights.fill(block, f"{self.path}.{index}.")
        return block.float().to(self.device).requires_grad_(False)


class PackedReader(BlockReader):
    """The blocks of a packed checkpoint, with PackedLinear modules."""

    def __init__(self, folder: ModelFolder, device: torch.device = CPU) -> None:
        """Raises ValueError for a folder that isn't packed, or whose packed tensors don't fit together; reads all but the codes."""
        super().__init__(folder, device)
        require(folder.quantization is not None, "load", str(folder.path), "a packed checkpoint", "a float model")
        self.format = formats.open_format(folder.quantization or {})
        self.linears = models.packed_linears(self.model, folder, self.format)
        self.leaves = tuple(leaf for leaf in self.format.leaves if leaf != self.format.codes)
        self.schemes = {}
        for name, (linear, prefix) in self.linears.items():
            tensors = models.packed_tensors(folder, prefix, self.leaves)
            _, zeros, _ = self.format.grid(name, tensors, linear.out_features, linear.in_features)
            scheme = self.format.scheme(name)
            assert scheme is not None  # or `grid` had refused
            # what the tensors say, where the configuration calls them symmetric and they aren't
            self.schemes[name] = formats.Scheme(scheme.bits, scheme.group_size, scheme.symmetric and zeros is None)

    def open_linear(self, name: str) -> PackedLinear:
        """The packed linear at a path in the model."""
        linear, prefix = self.linears[name]
        tensors = models.packed_tensors(self.folder, prefix, (*self.format.leaves, "bias"))
        packed = self.format.read(name, tensors, linear.out_features, linear.in_features)
        packed.activations = stored_activations(self.folder.quantization)
        return packed

    def open_block(self, index: int) -> nn.Module:
        """See BlockReader."""
        for name in self.linears:
            if name.startswith(f"{self.path}.{index}."):
                replace(self.model, name, self.open_linear(name))
        return super().open_block(index)
