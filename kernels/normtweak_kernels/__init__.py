"""The ops under normtweak: each a documented function with a definition in torch and faster bodies chosen at run time."""

from .affine import QuantizedWeight
from .channel_loss import ChannelStatistics, channel_loss, channel_loss_and_grad
from .dequant_gemm import dequant_gemm
from .gptq_block_update import gptq_block_update
from .gptq_solve import gptq_solve
from .group_params import group_params
from .hessian_update import hessian_update, mirror_lower
from .inverse_cholesky import inverse_cholesky
from .registry import which_backend
from .repack_gptq import repack_gptq, repack_to_gptq

__all__ = [
    "ChannelStatistics",
    "QuantizedWeight",
    "channel_loss",
    "channel_loss_and_grad",
    "dequant_gemm",
    "gptq_block_update",
    "gptq_solve",
    "group_params",
    "hessian_update",
    "inverse_cholesky",
    "mirror_lower",
    "repack_gptq",
    "repack_to_gptq",
    "which_backend",
]
