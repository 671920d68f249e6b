"""One training of a comparison, in a process of its own."""

import math
import os
import signal
import tempfile
import threading
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import parent_process
from typing import Any

import datasets
import onednn
import peers
import torch
import transformers
from compare_config import KINDS
from finetune import BAD_INPUT, set_up
from recipe import parse_arguments
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback

from hf_eva import EvaTrainer


class BadSettings(Exception):
    """A task or an optimizer cannot be made as it was asked for, whatever the run: `args` are which, and why."""


DIVERGED = 10  # times the first training loss
KEPT = 2**30  # bytes of decoded images that a process may keep


@dataclass(frozen=True)
class Job:
    """What a worker has to know of a run."""

    arguments: tuple[str, ...]  # of the task
    peer: str
    options: dict[str, Any]
    lr: float
    steps: int
    seed: int
    evaluations: int


def start_worker() -> None:
    """Makes a fresh process quiet, and lets it end with the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if parent := parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def start_fast_worker() -> None:
    """For trainings whose time is not taken."""
    start_worker()
    onednn.use_everywhere()


class Kept(Dataset):
    """Rows that are decoded once: with small models, that takes as long as the training."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows, self.kept = rows, {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self.kept:
            self.kept[index] = self.rows[index]
        return self.kept[index]


@lru_cache
def _prepared(arguments: tuple[str, ...]) -> tuple:
    model_args, data_args, _ = parse_arguments(KINDS, list(arguments), "")
    try:
        data, setup = set_up(model_args, data_args)
    except BAD_INPUT as error:
        raise BadSettings("tasks", str(error)) from error
    is_image = data_args.task == "image-classification"
    if is_image and data["train"][0]["pixel_values"].nbytes * len(data["train"]) < KEPT:
        data = {split: Kept(rows) for split, rows in data.items()}
    if data_args.task == "sequence-classification":  # a batch is padded to its longest, and these are half as long
        lengths = [len(tokens) for tokens in data["validation"]["input_ids"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        data["validation"] = data["validation"].select(order)
    return data_args, data, setup


def make_trainer(job: Job, folder: str, *callbacks: TrainerCallback) -> EvaTrainer:
    """Returns a trainer with a fresh model under the seed of the job, and its optimizer."""
    data_args, data, setup = _prepared(job.arguments)
    settings = {
        "output_dir": folder,
        "max_steps": job.steps,
        "learning_rate": job.lr,
        "seed": job.seed,
        "optim": "adamw_torch",  # the Trainer makes none: the one below is there before it asks
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if peers.PEERS[job.peer].schedule == "constant":
        settings["lr_scheduler_type"] = "constant"
    words = [f"--{key}={value}" for key, value in settings.items()]
    _, _, args = parse_arguments(KINDS, [*job.arguments, *words], "")
    # The model knows no column by the name of the images, and the Trainer would drop it.
    args.remove_unused_columns &= data_args.task != "image-classification"
    transformers.set_seed(job.seed)
    others = {key: value for key, value in setup.items() if key != "model_init"}
    trainer = EvaTrainer(
        setup["model_init"](),
        args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        callbacks=list(callbacks),
        **others,
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.optimizer = peers.build(job.peer, trainer.model, job.lr, args.weight_decay, job.steps, job.options)
    except (ValueError, TypeError, ImportError) as error:
        raise BadSettings("optimizers", str(error)) from error
    transformers.set_seed(job.seed)  # whatever the optimizer drew, all see the same batches
    return trainer


class Recorder(TrainerCallback):
    """Evaluates at evenly spaced steps, the last included, and stops a training that has left all bounds."""

    def __init__(self, steps: int, evaluations: int) -> None:
        self.steps = {math.ceil(steps * number / evaluations) for number in range(1, evaluations + 1)}
        self.rows: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.bound = math.inf
        self.diverged = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = state.global_step in self.steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        self.losses.append(logs["loss"])
        if len(self.losses) == 1 and not self.rows:
            self.bound = DIVERGED * logs["loss"]
        if not logs["loss"] <= self.bound or not math.isfinite(logs["loss"]):
            self.diverged = control.should_training_stop = True
            control.should_evaluate = False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        loss = metrics["eval_loss"]
        if not math.isfinite(loss):
            self.diverged = control.should_training_stop = True
            return
        metric = metrics["eval_accuracy"] if "eval_accuracy" in metrics else math.exp(min(loss, 700))
        train_loss = sum(self.losses) / len(self.losses)
        self.rows.append({"step": state.global_step, "eval_loss": loss, "metric": metric, "train_loss": train_loss})
        self.losses.clear()


def train(job: Job) -> tuple[str, list[dict[str, float]]]:
    """Returns how the training ended, "ok" or "diverged", and its evaluations; the last row is at the last step."""
    recorder = Recorder(job.steps, job.evaluations)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(job, folder, recorder)
        try:
            trainer.train()
        except torch.linalg.LinAlgError:  # a decomposition of what is no longer finite
            recorder.diverged = True
    if recorder.diverged:
        rows = [row for row in recorder.rows if row["step"] < job.steps]
        return "diverged", [*rows, {"step": job.steps, "eval_loss": math.inf}]
    return "ok", recorder.rows
