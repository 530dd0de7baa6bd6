"""The ops under normtweak: each a documented function with a definition in torch and faster bodies chosen at run time."""

from .affine import QuantizedWeight
from .channel_loss import ChannelStatistics, channel_loss
from .dequant_gemm import dequant_gemm
from .gptq_block_update import gptq_block_update
from .group_params import group_params
from .registry import which_backend
from .repack_gptq import repack_gptq, repack_to_gptq

__all__ = [
    "ChannelStatistics",
    "QuantizedWeight",
    "channel_loss",
    "dequant_gemm",
    "gptq_block_update",
    "group_params",
    "repack_gptq",
    "repack_to_gptq",
    "which_backend",
]
