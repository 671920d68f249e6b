"""Products of stacks of matrices, each of which is large on one side only."""

from __future__ import annotations

import torch
from torch import Tensor

# Multiplications of one product and thread from which oneDNN is called for each matrix of a stack: what is smaller is
# done before a call has been prepared.
LARGE = 2**22


def product(left: Tensor, right: Tensor) -> Tensor:
    """
    `left @ right` of stacks `(n, a, b)` and `(n, b, c)` of one precision, which is kept.

    torch takes a batched product in float32 to the BLAS that it was built with. MKL's gets to half of what a processor
    can do that is not Intel's: there, oneDNN needs less than half of its time for a large matrix and a few columns.
    """
    large = left if left.numel() > right.numel() else right
    if not _suits_onednn(large, left.shape[1] * right.numel() // len(right)):
        return left.bmm(right)
    if not large.is_contiguous():  # nothing large may be copied
        return product(right.mT, left.mT).mT
    linear = torch.ops.mkldnn._linear_pointwise
    pairs = zip(left.contiguous(), right.mT, strict=True)
    return torch.stack([linear(one, other, None, "none", [], "") for one, other in pairs])


def _suits_onednn(large: Tensor, multiplications: int) -> bool:
    return (
        large.device.type == "cpu"
        and large.dtype == torch.float32
        and multiplications >= LARGE * torch.get_num_threads()
        and (large.is_contiguous() or large.mT.is_contiguous())
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
