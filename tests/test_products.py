"""Products of stacks: oneDNN's are those of torch, in full precision, whatever way a stack lies in memory."""

import pytest
import torch
from helpers import assert_near

from hf_eva import products

COUNT, ROWS, COLUMNS, VECTORS = 3, 70, 50, 16


def stack(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def calls(monkeypatch):
    """The shapes that oneDNN is called with, also for products that are small."""
    seen, linear = [], torch.ops.mkldnn._linear_pointwise

    def noting(one, other, *settings):
        assert one.is_contiguous(), "a copy would be made"
        seen.append((tuple(one.shape), tuple(other.shape)))
        return linear(one, other, *settings)

    monkeypatch.setattr(products, "LARGE", 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", noting)
    return seen


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_products_by_onednn_are_in_full_precision(side, transposed, calls):
    large = stack(COUNT, COLUMNS, ROWS).mT if transposed else stack(COUNT, ROWS, COLUMNS)
    pair = (large, stack(COUNT, COLUMNS, VECTORS)) if side == "left" else (stack(COUNT, ROWS, VECTORS).mT, large)
    found = products.product(*pair)
    assert len(calls) == COUNT
    assert_near([found.double()], [pair[0].double().bmm(pair[1].double())], 1e-5)


def test_what_onednn_does_not_know_is_left_to_torch(calls, monkeypatch):
    large, small = stack(COUNT, ROWS, COLUMNS), stack(COUNT, COLUMNS, VECTORS)
    products.product(large.double(), small.double())
    products.product(stack(COUNT, ROWS, 2 * COLUMNS)[:, :, ::2], small)  # in no order that needs no copy
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    products.product(large, small)
    assert not calls


def test_small_products_are_done_by_one_call(calls, monkeypatch):
    monkeypatch.setattr(products, "LARGE", ROWS * COLUMNS * VECTORS)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    products.product(stack(COUNT, ROWS, COLUMNS), stack(COUNT, COLUMNS, VECTORS - 1))
    assert not calls
    products.product(stack(COUNT, ROWS, COLUMNS), stack(COUNT, COLUMNS, VECTORS))
    assert len(calls) == COUNT
