"""What stacks of layers ask for is done once for all of them, and nobody gets another one's answer."""

import copy

import pytest
import torch
from helpers import RECIPES, assert_equal, assert_near
from torch.overrides import TorchFunctionMode

from hf_eva import EvaConfig, create_eva_optimizer, stacks
from hf_eva.routines import at_once, together


def test_one_call_answers_all_that_ask_for_the_same():
    calls = []

    def scaled(values, factors, power=1):
        calls.append(tuple(values.shape))
        return values * factors.unsqueeze(1), factors**power

    def doubled(values):
        return 2 * values

    def asking(count, width, power):
        values, factors = torch.randn(count, width), torch.randn(count)
        (one, other) = yield from at_once(scaled, (values, factors), (values + 1, factors), power=power)
        (single,) = yield from at_once(doubled, (values,))
        for (products, powers), given in ((one, values), (other, values + 1)):
            assert_equal([products, powers, single], [given * factors.unsqueeze(1), factors**power, 2 * values])
        return count

    assert together([asking(2, 3, 1), asking(4, 3, 1), asking(1, 5, 1), asking(3, 3, 2)]) == [2, 4, 1, 3]
    assert sorted(calls) == [(2, 5), (6, 3), (12, 3)]


def test_what_is_small_is_computed_on_one_thread():
    def asking(function):
        return (yield from at_once(function, (torch.ones(2, 2),)))

    def noting(values):
        seen.append(torch.get_num_threads())
        return values

    def failing(values):
        raise RuntimeError("as a decomposition may")

    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        together([asking(noting)])
        assert seen == [1] and torch.get_num_threads() == 2
        with pytest.raises(RuntimeError, match="decomposition"):
            together([asking(failing)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_precisions_are_not_mixed():
    def asking(dtype):
        (found,) = yield from at_once(torch.neg, (torch.ones(2, 2, dtype=dtype),))
        return found.dtype

    assert together([asking(torch.float32), asking(torch.float64)]) == [torch.float32, torch.float64]


class Decompositions(TorchFunctionMode):
    """Counts calls, and the matrices that they are given."""

    def __init__(self):
        self.calls = self.matrices = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.linalg.eigh:
            self.calls, self.matrices = self.calls + 1, self.matrices + len(args[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [*RECIPES.values(), EvaConfig(base="sgd", rank=3)], ids=[*RECIPES, "sgd"])
def test_stacks_that_step_side_by_side_step_as_alone(family, config, monkeypatch):
    """Every stack has its own part of the buffer that they share, also where layers have several shapes."""
    torch.manual_seed(0)
    expected = family.build().double()
    found = copy.deepcopy(expected)
    optimizers = [create_eva_optimizer(model, lr=0.01, config=config) for model in (expected, found)]

    def steps(model, optimizer):
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            model(**family.batch).loss.backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad += torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 100
            optimizer.step()
            optimizer.zero_grad()

    with Decompositions() as few:
        steps(found, optimizers[1])
    monkeypatch.setattr(stacks, "MOST_WEIGHTS", {"cpu": 1})
    with Decompositions() as many:
        steps(expected, optimizers[0])
    assert_near(found, expected, 1e-9)
    assert many.matrices == few.matrices
    assert many.calls >= 2 * few.calls
