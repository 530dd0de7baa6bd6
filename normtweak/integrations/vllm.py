"""The vLLM plugin: packed checkpoints of 2, 3, 4 and 8 bits through normtweak's kernels, C++ on the CPU, Triton on the GPU.

Installed beside vLLM it is found by itself (entry point group `vllm.general_plugins`, which calls `register`). A linear's tensors are read whole, each rank
cuts its part out of them (normtweak/shards.py), and after loading they are packed for the kernels once.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
import vllm
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from ..checkpoint import stored_activations
from ..config import require
from ..shards import STORED, Shard, check_order, first_row
from .vllm_rules import NAME, Packing, check_settings, claims, packings, part_names, version_problem

logger = logging.getLogger(__name__)

# A GPU older than this has no tensor-core code of Triton's.
MIN_CAPABILITY = 80
# Ways of loading that don't hand a checkpoint's tensors to the layers.
WITHOUT_TENSORS = ("dummy", "sharded_state", "runai_streamer_sharded")
EXPERTS = {"FusedMoE", "RoutedExperts"}


def register() -> None:
    """Make vLLM know the quantization "normtweak"; in a vLLM that the plugin isn't for, say so in one line instead."""
    problem = version_problem(vllm.__version__)
    if problem:
        logger.warning("%s; its checkpoints won't load", problem)
        return
    register_quantization_config(NAME)(NormTweakVllmConfig)


class NormTweakVllmConfig(QuantizationConfig):
    """A checkpoint's `quantization_config`, in GPTQ's words, as vLLM wants it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        check_settings(settings)
        self.settings = settings
        self.stored: frozenset[str] | None = None

    @classmethod
    def get_name(cls) -> str:
        """What `--quantization` calls it."""
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Dtypes of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPU."""
        return MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Where the settings are when config.json lacks them."""
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NormTweakVllmConfig:
        """Raises ValueError for settings that the plugin can't run."""
        return cls(config)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None) -> str | None:
        """ "normtweak" for the checkpoints that are taken from vLLM's own GPTQ, see `vllm_rules.claims`."""
        return NAME if claims(hf_quant_cfg, user_quant) else None

    @staticmethod
    def get_checkpoint_weight_mapper() -> Any:
        """Nothing is dropped: g_idx is checked."""
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Notes which linears have codes, from the headers of the checkpoint's files."""
        from vllm.transformers_utils.config import get_safetensors_params_metadata

        names = get_safetensors_params_metadata(model_name, revision=revision)
        packed = frozenset(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))
        self.stored = packed or None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names in the checkpoint become those of vLLM's model."""
        if self.stored:
            self.stored = frozenset(hf_to_vllm_mapper.apply_list(sorted(self.stored)))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """How vLLM runs a layer. Raises ValueError for packed experts and for merged linears of which only some are packed."""
        names = part_names(prefix, self.packed_modules_mapping)
        if EXPERTS & {kind.__name__ for kind in type(layer).__mro__}:
            inside = [name for name in self.stored or [] if name.startswith(f"{prefix}.")]
            require(not inside, NAME, prefix, "linears (experts are run by normtweak.load, not by vLLM)", "a mixture of packed experts")
            return None
        if isinstance(layer, ParallelLMHead):
            quantized = bool(self.settings.get("lm_head"))
        else:
            quantized = isinstance(layer, LinearBase)
        if not quantized:
            return None
        found = packings(self.settings, names, self.stored)
        if None not in found:
            v2 = self.settings.get("checkpoint_format") == "gptq_v2"
            return NormTweakLinearMethod(prefix, found, v2=v2, activations=stored_activations(self.settings))
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class NormTweakLinearMethod(LinearMethodBase):
    """A linear, or several merged ones, through `normtweak_kernels.dequant_gemm`.

    Parts that are packed alike lie in one packed weight; others have one each, and their outputs are put side by side.
    """

    def __init__(self, path: str, parts: list[Packing], *, v2: bool, activations: str) -> None:
        self.path, self.parts, self.v2, self.activations = path, parts, v2, activations

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters in GPTQ's layout with a loader that cuts this rank's part. Called by vLLM's linears."""
        sizes = list(output_partition_sizes)
        parts = self.parts * len(sizes) if len(self.parts) == 1 else self.parts
        require(len(parts) == len(sizes), NAME, self.path, f"of {len(parts)} parts", f"{len(sizes)} in vLLM's model")
        start = layer.tp_rank * input_size_per_partition if input_size_per_partition < input_size else 0
        self.runs: list[tuple[Shard, int]] = []  # of parts that are packed alike: their shard and number of rows
        self.places: list[tuple[int, int, int]] = []  # of each part: its run, its first row there, its number of rows
        for number, (packing, rows) in enumerate(zip(parts, sizes, strict=True)):
            assert packing is not None
            if number == 0 or packing != parts[number - 1]:
                self.runs.append((Shard(*packing, input_size, start, start + input_size_per_partition), 0))
            shard, filled = self.runs[-1]
            self.places.append((len(self.runs) - 1, filled, rows))
            self.runs[-1] = shard, filled + rows
        self.missing = {(leaf, part) for leaf in STORED for part in range(len(sizes))}
        for number, (shard, rows) in enumerate(self.runs):
            for leaf, tensor in shard.empty(rows).items():
                layer.register_parameter(_name(leaf, number), nn.Parameter(tensor, requires_grad=False))
        layer.register_parameter("g_idx", nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False))
        for leaf in (*STORED, "g_idx"):
            getattr(layer, leaf).weight_loader = partial(self.load, layer, leaf)

    def load(self, layer: Any, leaf: str, parameter: nn.Parameter, stored: Tensor, shard_id: Any = None) -> None:
        """Take one tensor of a checkpoint's linear: of the part with this shard_id, or of parts that the checkpoint has merged already."""
        numbers = self._parts_of(shard_id)
        shards = {self.runs[self.places[number][0]][0] for number in numbers}
        require(len(shards) == 1, NAME, self.path, "packed alike, as the checkpoint has merged them", f"{len(shards)} ways")
        (shard,) = shards
        if leaf == "g_idx":
            return check_order(self.path, stored, shard.group_size)
        sizes = _whole_rows(layer)
        whole = [sizes[number] for number in numbers]
        offset, total = 0, sum(whole)
        for number, rows in zip(numbers, whole, strict=True):
            run, at, local = self.places[number]
            first, last = _rank_rows(layer, rows, local)
            target = getattr(layer, _name(leaf, run)).data[:, at : at + last - first]
            target.copy_(shard.cut(leaf, stored, total, offset + first, offset + last, v2=self.v2))
            offset += rows
            self.missing.discard((leaf, number))

    def _parts_of(self, shard_id: Any) -> list[int]:
        if shard_id is None:
            return list(range(len(self.places)))
        if isinstance(shard_id, tuple):
            return [int(number) for number in shard_id]
        return [{"q": 0, "k": 1, "v": 2}[shard_id] if isinstance(shard_id, str) else int(shard_id)]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the codes for the kernels. Raises ValueError when the checkpoint lacked some of them."""
        if get_current_vllm_config().load_config.load_format not in WITHOUT_TENSORS:
            lacking = ", ".join(sorted({leaf for leaf, _ in self.missing}))
            require(not self.missing, NAME, self.path, "packed with qweight, qzeros and scales", f"no {lacking}")
        packed = []
        for number, (shard, _) in enumerate(self.runs):
            packed.append(shard.pack({leaf: getattr(layer, _name(leaf, number)).data for leaf in STORED}))
            packed[-1].activations = self.activations
            for leaf in STORED:
                delattr(layer, _name(leaf, number))
        del layer.g_idx
        layer.packed = nn.ModuleList(packed)
        self.packed = tuple(packed)
        layer.qweight = packed[0].qweight  # vLLM's LoRA looks here for the device

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]."""
        # Past nn.Module's calls and attributes, which take a third as long as a small product.
        if len(self.packed) == 1:
            return self.packed[0].forward(x, bias)
        y = torch.cat([linear.forward(x) for linear in self.packed], -1)
        return y if bias is None else y + bias


def _name(leaf: str, run: int) -> str:
    return leaf if run == 0 else f"{leaf}_{run}"


def _rank_rows(layer: Any, rows: int, local: int) -> tuple[int, int]:
    """Which of a linear's rows are this rank's. A vocabulary's is padded: the last rank may hold fewer than its share."""
    if isinstance(layer, ParallelLMHead):
        return layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
    first = first_row(rows, local, layer.tp_rank, layer.tp_size)
    return first, first + local


def _whole_rows(layer: Any) -> list[int]:
    """How many rows each part has before ranks share them."""
    if isinstance(layer, ParallelLMHead):
        return [layer.org_vocab_size]
    if hasattr(layer, "total_num_kv_heads"):  # `output_sizes` counts heads that several ranks hold more than once
        kv = layer.total_num_kv_heads
        return [layer.total_num_heads * layer.head_size, kv * layer.head_size, kv * getattr(layer, "v_head_size", layer.head_size)]
    return list(getattr(layer, "output_sizes", [layer.output_size]))
