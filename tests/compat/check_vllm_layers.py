"""vLLM's own parallel layers with the plugin, two ranks in one process: each rank's output against its part of the whole weight. Run it with a Python that has
vLLM: python tests/compat/check_vllm_layers.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear, vocab_parallel_embedding
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

sys.path.insert(0, str(Path(__file__).parent.parent))
from normtweak.integrations.vllm import NormTweakVllmConfig
from normtweak_kernels.dequant_gemm.reference import quantize_activations
from stored_linears import stored_linear

K, RANKS = 576, 2
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def config(**settings) -> NormTweakVllmConfig:
    made = NormTweakVllmConfig({"quant_method": "gptq", "bits": 3, "group_size": 64, "lm_head": True} | settings)
    made.packed_modules_mapping = MERGED
    return made


def feed(layer, tensors: dict[str, torch.Tensor], *shard_id) -> None:
    for name in ("qweight", "scales", "qzeros", "g_idx"):
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensors[name], *shard_id)


def close(name: str, layer, weight: torch.Tensor, columns: slice = slice(None), enters=lambda x: x) -> None:
    """enters: what the product is to make of its input."""
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, K)[:, columns]
    got, wanted = layer.quant_method.apply(layer, x, None), enters(x) @ weight[:, columns].t()
    torch.testing.assert_close(got[:, : len(weight)], wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    print(f"ok   {name}")


def check_rank(rank: int) -> None:
    def half(weight: torch.Tensor) -> torch.Tensor:
        return weight.chunk(RANKS)[rank]

    # one key-value head: both ranks hold it; v at other bits
    quant = config(dynamic={"+:.*v_proj": {"bits": 8, "group_size": 32}})
    qkv = QKVParallelLinear(K, 24, 6, 1, bias=False, quant_config=quant, prefix="attn.qkv_proj", params_dtype=torch.float32)
    parts = {"q": stored_linear(144, K, 3, 64), "k": stored_linear(24, K, 3, 64, seed=1), "v": stored_linear(24, K, 8, 32, seed=2)}
    for name, (_, tensors) in parts.items():
        feed(qkv, tensors, name)
    close(f"rank {rank}: qkv with parts of their own, one key-value head", qkv, torch.cat([half(parts["q"][0]), parts["k"][0], parts["v"][0]]))

    whole, tensors = stored_linear(144 + 48 + 48, K, 3, 64)
    fused = QKVParallelLinear(K, 24, 6, 2, bias=False, quant_config=config(), prefix="attn.qkv_proj", params_dtype=torch.float32)
    feed(fused, tensors)
    close(f"rank {rank}: qkv merged in the checkpoint", fused, torch.cat([half(part) for part in whole.split([144, 48, 48])]))

    whole, tensors = stored_linear(2 * 74, K, 2, -1)
    quant = config(bits=2, group_size=-1)
    gate_up = MergedColumnParallelLinear(K, [74, 74], bias=False, quant_config=quant, prefix="mlp.gate_up_proj", params_dtype=torch.float32)
    feed(gate_up, tensors)
    close(f"rank {rank}: gate and up merged in the checkpoint, 37 rows each", gate_up, torch.cat([half(part) for part in whole.split(74)]))

    whole, tensors = stored_linear(50, K, 3, 64)
    down = RowParallelLinear(K, 50, bias=False, quant_config=config(), prefix="mlp.down_proj", params_dtype=torch.float32)
    feed(down, tensors)
    close(f"rank {rank}: a row-parallel linear cut through a group", down, whole, slice(288 * rank, 288 * (rank + 1)))

    whole, tensors = stored_linear(54, K, 4, 64, v2=True)
    up = ColumnParallelLinear(
        K, 54, bias=False, quant_config=config(bits=4, checkpoint_format="gptq_v2"), prefix="mlp.fc1", params_dtype=torch.float32
    )
    feed(up, tensors)
    close(f"rank {rank}: a column-parallel linear of format v2", up, half(whole))

    # rounded as the checkpoint says, which is farther from the exact product than `close` allows
    whole, tensors = stored_linear(54, K, 4, -1)
    rounded = config(bits=4, group_size=-1, meta={"activations": "int8_token"})
    up = ColumnParallelLinear(K, 54, bias=False, quant_config=rounded, prefix="mlp.fc1", params_dtype=torch.float32)
    feed(up, tensors)
    close(f"rank {rank}: activations of 8 bits, a scale a token", up, half(whole), enters=lambda x: quantize_activations(x, 1, "int8_token"))

    whole, tensors = stored_linear(105, K, 3, 64)
    head = ParallelLMHead(105, K, quant_config=config(), prefix="lm_head", params_dtype=torch.float32)
    feed(head, tensors)
    first, last = head.shard_indices.org_vocab_start_index, head.shard_indices.org_vocab_end_index
    close(f"rank {rank}: the rows {first} to {last} of a packed head", head, whole[first:last])


def main() -> None:
    with set_current_vllm_config(VllmConfig()):
        for rank in range(RANKS):
            torch.manual_seed(rank)
            for module in (linear, vocab_parallel_embedding):
                patch.object(module, "get_tensor_model_parallel_rank", return_value=rank).start()
                patch.object(module, "get_tensor_model_parallel_world_size", return_value=RANKS).start()
            check_rank(rank)
            patch.stopall()


if __name__ == "__main__":
    main()
