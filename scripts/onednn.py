"""
Products of matrices in float32 by oneDNN, for CPUs on which MKL's take twice as long.

MKL, which torch calls by itself, gets to half of what a processor can do that is not Intel's. `hf_eva` calls oneDNN
for its own products; here are those of the optimizers it is compared with, so that none of them waits for a library,
and, for runs of which nobody takes the time, those of everything that a process computes.
"""

import warnings

import torch
from torch import Tensor

from hf_eva.hardware import cpu_name
from hf_eva.products import LARGE

_LIBRARY = torch.library.Library("aten", "IMPL")  # what it registers holds as long as it lives


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of two matrices."""
    if _suits(left, right):
        return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return torch.mm(left, right)


def use_everywhere() -> None:
    """
    From now on, all large products of this process are oneDNN's, in forward and backward passes too, where that is
    the faster library. A small model trains in two thirds of the time, a larger one in not much more than half.
    """
    if "Intel" in cpu_name() or not torch.backends.mkl.is_available() or not _is_there():
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*other operators may also be overridden", category=UserWarning)
        _LIBRARY.impl("mm", _mm, "CPU")
        _LIBRARY.impl("addmm", _addmm, "CPU")


def _suits(left: Tensor, right: Tensor) -> bool:
    return (
        left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and left.shape[0] * left.shape[1] * right.shape[1] >= LARGE
        and _is_there()
    )


def _is_there() -> bool:
    return bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if _suits(left, right):
        return matmul(left, right)
    return torch.mm(left, right, out=left.new_empty(len(left), right.shape[1]))  # the operation that is left as it was


def _addmm(bias: Tensor, left: Tensor, right: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    if _suits(left, right) and bias.shape == right.shape[1:] and beta == alpha == 1:
        return torch.ops.mkldnn._linear_pointwise(left, right.T, bias, "none", [], "")
    out = left.new_empty(len(left), right.shape[1])
    return torch.addmm(bias, left, right, beta=beta, alpha=alpha, out=out)
