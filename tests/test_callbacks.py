"""Times in the logs."""

from __future__ import annotations

import time

import pytest
from tiny_training import arguments, data, model

from hf_eva import EvaTrainer


class SlowTrainer(EvaTrainer):
    """Sleeps in known places, so that what is measured can be told apart from what is not."""

    def training_step(self, *args, **kwargs):
        time.sleep(0.02)
        return super().training_step(*args, **kwargs)

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        step = optimizer.step

        def slow_step(*args, **kwargs):
            time.sleep(0.02)
            return step(*args, **kwargs)

        optimizer.step = slow_step
        return optimizer

    def prediction_step(self, *args, **kwargs):
        time.sleep(0.01)
        return super().prediction_step(*args, **kwargs)


@pytest.mark.parametrize("optim", ["eva", "sgd"])
def test_times_are_where_they_were_spent(tmp_path, optim):
    args = arguments(tmp_path, optim=optim, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=32)
    trainer = SlowTrainer(model(), args, train_dataset=data(), eval_dataset=data())
    metrics = trainer.train().metrics
    assert metrics["train_steps_seconds"] >= 6 * 0.04
    assert metrics["train_evaluation_seconds"] >= 2 * 0.01
    assert metrics["train_total_seconds"] >= metrics["train_steps_seconds"] + metrics["train_evaluation_seconds"]
    assert 6 * 0.02 / metrics["train_steps_seconds"] <= metrics["train_optimizer_share"] < 1
    assert metrics["train_peak_memory_gib"] > 0


def test_intervals_are_logged_beside_the_loss(tmp_path):
    trainer = EvaTrainer(model(), arguments(tmp_path), train_dataset=data())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3
    assert all(log["step_seconds"] > 0 and 0 < log["optimizer_share"] < 1 for log in logs)
    mean = sum(log["step_seconds"] for log in logs) / len(logs)
    assert mean * 6 == pytest.approx(trainer.eva_callback.times.in_steps)


def test_a_second_training_starts_from_zero(tmp_path):
    trainer = EvaTrainer(model(), arguments(tmp_path), train_dataset=data())
    trainer.train()
    trainer.train()
    assert trainer.eva_callback.times.steps == 6


def test_evaluation_outside_a_training_is_not_counted(tmp_path):
    trainer = EvaTrainer(model(), arguments(tmp_path), train_dataset=data(), eval_dataset=data())
    trainer.train()
    trainer.evaluate()
    assert trainer.eva_callback.times.in_evaluation == 0
