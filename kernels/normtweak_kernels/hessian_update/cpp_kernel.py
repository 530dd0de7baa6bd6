"""hessian_update on the CPU: the lower triangle's products, csrc/cpu/hessian_update.cpp, or torch's where AMX is."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native, registry
from ..launch import HESSIAN_UPDATE_CPU
from ..precision import matmul_precision


@registry.register("hessian_update", "cpp", native.refuses)
def hessian_update(hessian: Tensor, x: Tensor) -> None:
    """See the package's docstring."""
    tokens, k = x.shape
    if tokens == 0 or k == 0:
        return
    module = native.loaded()
    if x.dtype == torch.bfloat16 and module.has_amx():
        with_torch(hessian, x)
        return
    # float32 products of bfloat16 values are exact too, only slower.
    x = x.contiguous() if x.dtype == torch.bfloat16 and module.hessian_bfloat16() else x.float().contiguous()
    module.hessian_update(torch.get_num_threads(), native.address(hessian), native.address(x), native.DTYPES[x.dtype], tokens, k)


def with_torch(hessian: Tensor, x: Tensor) -> None:
    """The lower triangle in strips of rows, by torch's bfloat16 products; for processors on which oneDNN multiplies those with AMX."""
    k, rows = len(hessian), HESSIAN_UPDATE_CPU.strip_rows
    values = x.float()
    with matmul_precision("medium"):
        for start in range(0, k, rows):
            stop = min(start + rows, k)
            hessian[start:stop, :stop].addmm_(values[:, start:stop].t(), values[:, :stop])
