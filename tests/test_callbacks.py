"""Times in the logs, and what Eva does in each step."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch
from accelerate import Accelerator
from tiny_training import arguments, data, model, stock_arguments
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_eva import Eva, EvaTrainer, create_eva_optimizer, register, unregister
from hf_eva.callbacks import EvaCallback
from hf_eva.runs import Run


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


# What Eva does -------------------------------------------------------------------------------------------------------


def told(logs: list[dict[str, float]]) -> list[dict[str, float]]:
    """What the optimizer told of its steps, log by log."""
    return [found for log in logs if (found := {key: v for key, v in log.items() if key.startswith("eva_")})]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"logging_steps": 2}, [2, 4, 6]),
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4]),
        ({"logging_strategy": "epoch"}, [4, 6]),
        ({"logging_strategy": "no"}, []),
        ({"logging_steps": 2, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}, [2, 4, 6]),
    ],
)
def test_the_optimizer_is_asked_when_the_trainer_logs_and_at_no_other_time(settings, steps, tmp_path, monkeypatch):
    asked, found = [], []

    def diagnostics(optimizer, *args):
        asked.append(trainer.state.global_step)
        found.append(original(optimizer, *args))
        return found[-1]

    original = Eva.diagnostics
    monkeypatch.setattr(Eva, "diagnostics", diagnostics)
    trainer = EvaTrainer(model(), arguments(tmp_path, **settings), train_dataset=data())
    trainer.train()
    assert asked == steps
    logs = [log for log in trainer.state.log_history if "eva_strength" in log]
    assert [log["step"] for log in logs] == steps and told(logs) == found
    layers = [f"eva_strength/{layer.name}" for layer in trainer.optimizer.optimizer.layers]
    assert all(0 <= log[layer] < 1 for log in logs for layer in layers)


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (file,) = folder.rglob("events.out.tfevents.*")
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("preset", ["recipe", "paper_eva"])
@pytest.mark.parametrize("log_layers", [True, False])
def test_tensorboard_shows_all_of_it(preset, log_layers, tmp_path):
    settings = {"report_to": "tensorboard", "eva_preset": preset, "eva_log_layers": log_layers}
    trainer = EvaTrainer(model(), arguments(tmp_path, **settings), train_dataset=data())
    trainer.train()
    shown = scalars(tmp_path)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for key in logs[0].keys() - {"step"}:
        expected = [(log["step"], pytest.approx(log[key], rel=1e-6)) for log in logs]
        assert shown[f"train/{key}"][: len(logs)] == expected
    layers = {tag for tag in shown if tag.startswith("train/eva_strength/")}
    assert len(layers) == (8 if log_layers else 0)
    summary = {"step_seconds", "optimizer_milliseconds", "optimizer_share", "eva_strength", "eva_update_size"}
    summary |= {"eva_curvature_inputs", "eva_curvature_outputs", "eva_fallback_layers"}
    summary |= {"eva_kl_factor"} if preset == "paper_eva" else set()
    assert {f"train/{key}" for key in summary} <= shown.keys()


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_lines_on_the_console_stay_short(disable_tqdm, tmp_path, capfd):
    trainer = EvaTrainer(model(), arguments(tmp_path, disable_tqdm=disable_tqdm), train_dataset=data())
    trainer.train()
    printed = "".join(capfd.readouterr())
    assert printed.count("'eva_strength'") == 3 and "train_optimizer_share" in printed
    assert "eva_strength/" not in printed and "eva_curvature" not in printed
    assert len(told(trainer.state.log_history)) == 3


@pytest.mark.parametrize(("optim", "variant"), [("adamw_torch", None), ("eva", "none")])
def test_first_order_optimizers_have_times_alone(optim, variant, tmp_path):
    trainer = EvaTrainer(model(), arguments(tmp_path, optim=optim, eva_variant=variant), train_dataset=data())
    trainer.train()
    assert not told(trainer.state.log_history)
    assert all(log["optimizer_milliseconds"] > 0 for log in trainer.state.log_history if "loss" in log)


def test_the_trainer_restores_a_callback_and_logs_on(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "restore_callback_states_from_checkpoint": True}
    EvaTrainer(model(), arguments(tmp_path, **settings, max_steps=4), train_dataset=data()).train()
    trainer = EvaTrainer(model(), arguments(tmp_path, **settings, max_steps=6), train_dataset=data())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.eva_callback.times.steps == 6
    assert [log["step"] for log in trainer.state.log_history if "eva_strength" in log] == [2, 4, 6]


def test_a_real_run_has_its_heat_map(tmp_path):
    pytest.importorskip("matplotlib")
    from hf_eva.plots import plot_runs

    trainer = EvaTrainer(model(), arguments(tmp_path), train_dataset=data())
    trainer.train()
    trainer.save_state()
    run = Run.read(tmp_path)
    strengths = run.strengths()
    assert strengths.layers == tuple(layer.name for layer in trainer.optimizer.optimizer.layers)
    assert strengths.steps == (2, 4, 6) and all(0 <= value < 1 for row in strengths.values for value in row)
    assert [path.name for path in plot_runs([run], tmp_path / "loss.svg")] == ["loss.svg", "loss-strength.svg"]


def test_registered_stock_trainers_log_it_where_they_train_with_eva(tmp_path):
    register()
    try:
        trainers = {}
        for cls, make, optim in (
            (Trainer, stock_arguments, "eva"),
            (Trainer, stock_arguments, "adamw_torch"),
            (EvaTrainer, arguments, "eva"),
        ):
            folder = tmp_path / f"{cls.__name__}-{optim}"
            trainers[folder.name] = cls(
                model(), make(folder, optim=optim, report_to="tensorboard"), train_dataset=data()
            )
            trainers[folder.name].train()
    finally:
        unregister()
    stock, first_order, own = (trainer.state.log_history for trainer in trainers.values())
    brief = [{key: value for key, value in log.items() if "/" not in key} for log in told(own)]
    assert told(stock) == brief and len(brief) == 3
    assert {key for log in stock for key in log} == {key for log in own for key in log if "/" not in key}
    shown = scalars(tmp_path / "Trainer-eva")
    assert [step for step, _ in shown["train/eva_strength"]] == [2, 4, 6]
    assert not told(first_order) and not any("step_seconds" in log for log in first_order)
    handler = trainers["EvaTrainer-eva"].callback_handler
    assert sum(isinstance(callback, EvaCallback) for callback in handler.callbacks) == 1
    assert not any(isinstance(callback, EvaCallback) for callback in Trainer(model()).callback_handler.callbacks)


# Without a Trainer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("make", [create_eva_optimizer, lambda model: torch.optim.AdamW(model.parameters())])
def test_a_loop_of_accelerates(make, prepared):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = model()
    optimizer = make(net)
    watch = None if prepared else EvaCallback(optimizer)
    loader = DataLoader(data(), batch_size=4)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    watch = watch or EvaCallback(optimizer)
    assert watch.interval() == {}
    started = time.perf_counter()
    for batch in loader:
        time.sleep(0.01)
        with accelerator.accumulate(net), watch.timing():
            accelerator.backward(net(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    passed = time.perf_counter() - started
    assert watch.times.steps == 4
    found = watch.interval()
    assert 0 < found["step_seconds"] * 4 < passed - 8 * 0.01
    assert 0 < found["optimizer_milliseconds"] / 1000 < found["step_seconds"] and 0 < found["optimizer_share"] < 1
    is_eva = isinstance(optimizer.optimizer, Eva)
    assert told([found]) == ([optimizer.optimizer.diagnostics()] if is_eva else [])
    assert watch.interval() == {}
    summary = watch.summary()
    assert summary["train_steps_seconds"] == pytest.approx(4 * found["step_seconds"])
    assert summary["train_total_seconds"] >= passed


def test_a_watch_keeps_no_optimizer_alive():
    optimizer = create_eva_optimizer(model())
    watch, dead = EvaCallback(optimizer), weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert dead() is None
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match=r"give it, as in EvaCallback\(optimizer\)"), watch.timing():
        pass
