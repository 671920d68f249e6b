"""Without a process group nothing is sent; with one, a single sum. Real processes: `distributed/`."""

import pytest
import torch
import torch.distributed as dist

from hf_eva.collectives import begin_sum_


def test_one_process_sends_nothing(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: pytest.fail("sent"))
    buffer = torch.arange(3.0)
    assert begin_sum_(buffer) == (1, None)
    assert torch.equal(buffer, torch.arange(3.0))


def test_a_group_of_one_sends_nothing(monkeypatch, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: pytest.fail("sent"))
        assert begin_sum_(torch.ones(2)) == (1, None)
    finally:
        dist.destroy_process_group()


def test_a_build_without_distributed_sends_nothing(monkeypatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert begin_sum_(torch.ones(2)) == (1, None)
