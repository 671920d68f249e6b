"""What all tests share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Each test starts from one seed, and one thread decides the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["bert", "gpt2", "vit"])
def family(request: pytest.FixtureRequest):
    """The tiny BERT, GPT-2 and ViT, one after the other."""
    pytest.importorskip("transformers")
    from helpers import FAMILIES

    return FAMILIES[request.param]
