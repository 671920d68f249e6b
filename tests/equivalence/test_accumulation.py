"""How a batch is cut into micro-batches does not matter: 8 × 1 = 4 × 2 = 1 × 8, whatever is padded to what."""

import pytest
from harness import ALL, assert_same, split, train, whole
from zoo import ZOO

WAYS = {"4 × 2": (4, 4), "2 × 4": (2,) * 4, "1 × 8": (1,) * 8, "uneven": (3, 4, 1)}


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@pytest.mark.parametrize("name", ZOO)
def test_micro_batches_are_one_batch(name, config):
    expected = train(ZOO[name], config, whole)
    for sizes in WAYS.values():
        assert_same(train(ZOO[name], config, split(*sizes)), expected, config=config)
