"""The section of a model card that states the facts of a run, and the results in the metadata of the card."""

from __future__ import annotations

import logging
import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from jinja2 import Environment, StrictUndefined
from transformers.modelcard import METRIC_TAGS, TrainingSummary, parse_log_history

from .runs import Run, compare

logger = logging.getLogger(__name__)

_TITLE = "### Training time"
_SECTION = re.compile(rf"^{_TITLE}\n.*?(?=^#{{1,3}} |\Z)", re.MULTILINE | re.DOTALL)
_NEXT_SECTION = re.compile(r"^### Framework versions", re.MULTILINE | re.IGNORECASE)
# What the stock card says of a model built from a config, and of an optimizer whose options are not optim_args.
_NAMELESS_BASE = "This model is a fine-tuned version of [](https://huggingface.co/) on"
_STOCK_OPTIMIZER = re.compile(r"^(- optimizer: )Use eva and the args are:\n.*$", re.MULTILINE)
PICTURE = "loss.png"
_CAPTIONS = {
    "": "Loss over steps and seconds of training",
    "-strength": "Strength of preconditioning over layers and steps",
    "-spectra": "Spectra of the factors of each layer",
}


def write_training_section(
    run: Run, facts: dict[str, Any], baseline: Run | None = None, described: dict[str, Any] | None = None
) -> Path:
    """
    Put the section "Training time" into the model card in the folder of a run, draw the pictures that it embeds, and
    complete the metadata. Writes a card where there is none; returns its path.

    Args:
        run ([`Run`]): the run, with a folder.
        facts (`dict`): what is known of it, from [`run_facts`] or [`saved_facts`]. A comparison with a baseline is
            noted in it.
        baseline ([`Run`], *optional*): the run whose last evaluation loss is the target.
        described (`dict`, *optional*): the arguments of `Trainer.create_model_card`: with `dataset` and `tasks`, the
            results go into the metadata.

    Raises:
        ValueError: one of the two runs was never evaluated.
    """
    assert run.folder is not None
    if baseline is not None:
        facts["target"] = compare(run, baseline)
    path = run.folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else _new_card(run)
    section = _rendered({**facts, "target": facts.get("target"), "pictures": _draw(run, baseline)})
    text = card.text.replace(_NAMELESS_BASE, "This model was trained from scratch on")
    if facts["eva"]:
        text = _STOCK_OPTIMIZER.sub(r"\1eva, see the settings under Training time", text)
    text = _SECTION.sub("", text)
    following = _NEXT_SECTION.search(text)
    head, tail = (text[: following.start()], text[following.start() :]) if following else (text, "")
    card.text = f"{head.rstrip()}\n\n{section.strip()}\n\n{tail}"
    if facts["eva"]:
        card.data.tags = [*(tag for tag in card.data.tags or [] if tag != "eva"), "eva"]
    if facts["energy"]:
        card.data.co2_eq_emissions = _emissions(facts)
    if not card.data.eval_results and (results := _results(run, described or {})):
        card.data.eval_results = results
        card.data.model_name = card.data.model_name or (described or {}).get("model_name") or run.folder.resolve().name
    card.save(path)
    return path


def _new_card(run: Run) -> ModelCard:
    """What the stock Trainer would write, as far as the history of a run tells it."""
    assert run.folder is not None
    _, lines, results = parse_log_history(list(run.history))
    name = run.folder.resolve().name
    tags = ["generated_from_trainer"]
    return ModelCard(
        TrainingSummary(name, tags=tags, eval_lines=lines, eval_results=results or {}).to_model_card(),
        ignore_metadata_errors=True,
    )


def _rendered(facts: dict[str, Any]) -> str:
    template = files("hf_eva").joinpath("templates/training_section.md.j2").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["yaml"] = lambda values: yaml.safe_dump(values, sort_keys=False).rstrip()
    environment.filters["duration"] = duration
    return environment.from_string(template).render(title=_TITLE, **facts)


def _draw(run: Run, baseline: Run | None) -> dict[str, str]:
    """Draw the pictures into the folder of the run; returns the captions by file name, none without matplotlib."""
    assert run.folder is not None
    if not run.series("loss")[0] and not run.series("eval_loss")[0]:
        return {}
    try:
        from .plots import plot_runs
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        logger.warning("The model card has no plot, because matplotlib is missing: pip install 'hf-eva[plot]'")
        return {}
    path = run.folder / PICTURE
    written = [path.name for path in plot_runs([run], path)]
    if baseline is not None:
        target = baseline.series("eval_loss")[1][-1]
        named = [Run(Path(one.name).name, one.history, facts=one.facts) for one in (run, baseline)]
        plot_runs(named, path, target=target, layers=False)
    return {name: _CAPTIONS[Path(name).stem.removeprefix(path.stem)] for name in written}


def _emissions(facts: dict[str, Any]) -> dict[str, Any]:
    """In the form of the Hub's metadata, which counts in grams."""
    energy = facts["energy"]
    return {
        "emissions": energy["co2_kg"] * 1000,
        "energy_consumed": energy["kwh"],
        "source": "codecarbon",
        "geographical_location": energy["country"],
        "hardware_used": facts["hardware"],
    }


def _results(run: Run, described: dict[str, Any]) -> list[EvalResult]:
    """
    The last evaluation, for `model-index`. The stock Trainer fills it in for data sets from the Hub and for metrics
    that it knows; this adds local data, the loss, and the perplexity of a language model.
    """
    dataset, task = (_first(described.get(key)) for key in ("dataset", "tasks"))
    _, losses = run.series("eval_loss")
    if not (dataset and task and losses):
        return []
    values = {"loss": losses[-1]}
    if task == "text-generation":
        values["perplexity"] = math.exp(min(losses[-1], 700))
    for metric in METRIC_TAGS:
        _, measured = run.series(f"eval_{metric}")
        values |= {metric: measured[-1]} if measured else {}
    return [
        EvalResult(
            task_type=task,
            task_name=task.replace("-", " ").capitalize(),
            dataset_type=_first(described.get("dataset_tags")) or re.sub(r"[^\w.-]+", "-", dataset).strip("-"),
            dataset_name=dataset,
            metric_type=metric,
            metric_name=metric.capitalize(),
            metric_value=value,
        )
        for metric, value in values.items()
    ]


def _first(value: Any) -> str | None:
    return str(value[0]) if isinstance(value, list | tuple) and value else value or None


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min {rest} s"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
