"""What a comparison compares: its YAML file, checked, and the runs that follow from it."""

import hashlib
import json
import math
import types
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, get_args, get_origin, get_type_hints

from finetune import DataArguments, ModelArguments
from peers import PEERS
from recipe import near_miss, parse_arguments, read_recipe, read_yaml

from hf_eva import EvaConfig, EvaTrainingArguments
from hf_eva.config import PRESETS

KINDS = (ModelArguments, DataArguments, EvaTrainingArguments)
# What a run decides for itself, whatever the recipe says of it; `eva` covers `eval_steps` and its like, too.
OWN = ("optim", "eva", "logging_", "save_", "report_to", "output_dir", "seed", "max_steps", "learning_rate")


@dataclass(frozen=True)
class Tuning:
    seeds: list[int]
    budget: int = 5
    factor: float = 2.0


@dataclass(frozen=True)
class Sweep:
    optimizers: list[str]
    factors: list[float]


@dataclass(frozen=True)
class Timing:
    rounds: int = 7
    steps: int = 5


@dataclass(frozen=True)
class Run:
    """One training. Two with the same key are the same training, under whatever names."""

    digest: str  # of the task and the optimizer with their settings
    task: str
    optimizer: str
    lr: float
    steps: int
    seed: int

    @property
    def key(self) -> tuple[str, float, int, int]:
        return self.digest, self.lr, self.steps, self.seed


@dataclass(frozen=True)
class Task:
    """
    Args:
        arguments (`list[str]`): What a run takes from the recipe and the comparison, as a command line.
        learning_rate (`float`): AdamW's, from which the search of every optimizer starts.
        max_steps (`int`): The longest schedule.
    """

    arguments: list[str]
    learning_rate: float
    max_steps: int


@dataclass(frozen=True)
class Entry:
    """An optimizer of the comparison: one of `peers.PEERS` with options."""

    peer: str
    lr_ratio: float
    options: dict[str, Any]

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The options, for the Eva family with the defaults, whose changes make other runs."""
        preset = "recipe" if self.peer == "eva" else self.peer
        return (
            asdict(EvaConfig.from_options({"preset": preset, **self.options})) if preset in PRESETS else self.options
        )


@dataclass(frozen=True)
class Config:
    name: str
    seeds: list[int]
    tuning: Tuning
    baseline: str
    optimizers: dict[str, dict]
    tasks: dict[str, dict]
    lengths: list[float] = field(default_factory=lambda: [1.0])
    evaluations: int = 12
    subject: str = "eva"  # whose time to the target is set against everybody else's
    sweep: Sweep | None = None
    timing: Timing = field(default_factory=Timing)
    highlight: list[str] = field(default_factory=list)
    goals: dict[str, dict[str, float]] = field(default_factory=dict)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        return {name: _entry(name, settings) for name, settings in self.optimizers.items()}

    @cached_property
    def workloads(self) -> dict[str, Task]:
        return {name: _task(name, settings) for name, settings in self.tasks.items()}

    def contenders(self, task: str) -> list[str]:
        """The optimizers that are compared on a task: all, unless it has a list of its own."""
        return list(self.tasks[task].get("optimizers", self.optimizers))

    def tuning_seeds(self, task: str) -> list[int]:
        """The seeds of the search on a task: those of all, unless its losses differ much between seeds."""
        seeds = self.tasks[task].get("tuning_seeds", self.tuning.seeds)
        return _convert(list[int], seeds, f"tasks.{task}.tuning_seeds")

    def quick(self) -> "Config":
        """The subject against the baseline alone, on two seeds, without shorter schedules or a search."""
        both = dict.fromkeys([self.baseline, self.subject])
        return replace(
            self,
            name=f"{self.name}-quick",
            seeds=self.seeds[:2],
            lengths=[1.0],
            tuning=replace(self.tuning, budget=1, seeds=self.seeds[:1]),  # nothing is chosen: no runs of its own
            optimizers={name: self.optimizers[name] for name in both},
            tasks={
                task: settings | {"optimizers": list(both), "tuning_seeds": self.seeds[:1]}
                for task, settings in self.tasks.items()
            },
            sweep=None,
            timing=Timing(rounds=min(3, self.timing.rounds), steps=min(4, self.timing.steps)),
            highlight=[self.subject, self.baseline],
            goals={name: goals for name, goals in self.goals.items() if name == self.baseline},
        )

    def steps(self, task: str, length: float = 1.0) -> int:
        return max(1, round(self.workloads[task].max_steps * length))

    def digest(self, task: str, optimizer: str) -> str:
        entry = self.entries[optimizer]
        settings = [sorted(self.workloads[task].arguments), self.evaluations, entry.peer, entry.resolved]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    def start(self, task: str, optimizer: str) -> float:
        """The learning rate in the centre of the search."""
        return self.workloads[task].learning_rate * self.entries[optimizer].lr_ratio

    def run(self, task: str, optimizer: str, lr: float, steps: int, seed: int) -> Run:
        return Run(self.digest(task, optimizer), task, optimizer, float(f"{lr:.6g}"), steps, seed)


def read_config(path: str) -> Config:
    """Returns the comparison that the YAML file `path` describes; every mistake is one sentence and a `ValueError`."""
    config = _convert(Config, read_yaml(path, "comparison"), "")
    _check(config)
    return config


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Turns what YAML holds at the key `where` into a value of the type `kind`."""
    if isinstance(kind, types.UnionType):  # X | None
        kind = get_args(kind)[0]
    place = where or "the comparison"
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{place} should hold lines like `key: value`, got {value!r}")
        known, hints = {f.name: f for f in fields(kind)}, get_type_hints(kind)
        for key in value:
            if key not in known:
                raise ValueError(f"unknown key {key!r} in {place}{near_miss(key, list(known))}")
        for name, f in known.items():
            if name not in value and f.default is MISSING and f.default_factory is MISSING:
                raise ValueError(f"{place} has no {name!r}: it needs a line `{name}: ...`")
        return kind(**{key: _convert(hints[key], part, f"{where}.{key}".strip(".")) for key, part in value.items()})
    if kind is dict or get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{place} should hold lines like `name: ...`, got {value!r}")
        _, part_kind = get_args(kind) or (str, Any)
        return {key: _convert(part_kind, part, f"{where}.{key}") for key, part in value.items()}
    if get_origin(kind) is list:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{place} should be a list with at least one value, got {value!r}")
        return [_convert(get_args(kind)[0], part, where) for part in value]
    if kind is Any:
        return value
    try:
        converted = kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"{place} should be of type {kind.__name__}, got {value!r}") from None
    least = 0 if where.endswith("seeds") else 1 if kind is int else math.ulp(0)
    if kind is not str and not least <= converted < math.inf:
        raise ValueError(f"{place} should be {'at least ' + str(least) if kind is int else 'above 0'}, got {value!r}")
    return converted


def _check(config: Config) -> None:
    """Refuses what is of the right type and makes no sense."""
    tasks, optimizers = list(config.tasks), list(config.optimizers)
    for where, known, names in (
        ("baseline", optimizers, [config.baseline]),
        ("subject", optimizers, [config.subject]),
        ("highlight", optimizers, config.highlight),
        ("goals", optimizers, list(config.goals)),
        *((f"goals.{other}", tasks, list(goals)) for other, goals in config.goals.items()),
        ("sweep.optimizers", optimizers, config.sweep.optimizers if config.sweep else []),
    ):
        check_names(where, names, known)
    if not tasks:
        raise ValueError("tasks should name at least one task")
    for task in tasks:
        check_names(f"tasks.{task}.optimizers", config.contenders(task), optimizers)
        if shared := set(config.seeds) & set(config.tuning_seeds(task)):
            raise ValueError(
                f"seed {shared.pop()} is in seeds, and {task} is tuned on it: what is tuned on is not reported"
            )
        if config.baseline not in config.contenders(task):
            raise ValueError(f"tasks.{task}.optimizers should name the baseline, {config.baseline}")
    if not config.name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"name should be made of letters, digits, - and _, got {config.name!r}")
    if config.tuning.factor <= 1:
        raise ValueError(f"tuning.factor should be above 1, got {config.tuning.factor}")
    if 1 not in config.lengths:
        raise ValueError(f"lengths should name 1, the whole schedule, got {config.lengths}")
    _ = config.entries, config.workloads  # raises what is wrong with one of them


def check_names(where: str, names: list[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            hint = near_miss(name, known) or f": choose from {', '.join(known)}"
            raise ValueError(f"{where} names {name!r}, which is not in this comparison{hint}")


def _entry(name: str, settings: dict) -> Entry:
    where = f"optimizers.{name}"
    peer = settings.get("optimizer", name)
    if peer not in PEERS:
        hint = near_miss(peer, list(PEERS)) or f": choose from {', '.join(PEERS)}"
        raise ValueError(f"{where} is no known optimizer{hint}; another name needs a line `optimizer: ...`")
    ratio = _convert(float, settings.get("lr_ratio", PEERS[peer].lr_ratio), f"{where}.lr_ratio")
    options = {key: _typed(value) for key, value in settings.items() if key not in ("optimizer", "lr_ratio")}
    entry = Entry(peer, ratio, options)
    try:
        _ = entry.resolved
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return entry


def _typed(value: Any) -> Any:
    """An option as the number or truth value that it spells."""
    if not isinstance(value, str):
        return [_typed(part) for part in value] if isinstance(value, list) else value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value


def _task(name: str, settings: dict) -> Task:
    where = f"tasks.{name}"
    known = [f.name for kind in KINDS for f in fields(kind)]
    words = read_recipe(settings["recipe"], known) if "recipe" in settings else []
    for key, value in settings.items():
        if key in ("recipe", "optimizers", "tuning_seeds"):
            continue
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}{near_miss(key, known)}")
        words += [f"--{key}", *value] if isinstance(value, list) else [f"--{key}={value}"]
    merged: dict[str, list[str]] = {}  # the last word on a key wins, so that equal settings have one digest
    for word in words:
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            merged[key] = [value] if equals else []
        else:
            merged[key].append(word)
    merged = {
        key: values for key, values in merged.items() if values != [""]
    }  # an empty value takes the recipe's away
    try:
        _, _, args = parse_arguments(KINDS, _command_line(merged), "")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if args.max_steps <= 0:
        raise ValueError(f"{where} has no max_steps: a comparison needs the length of its schedule")
    kept = {key: values for key, values in merged.items() if not key.startswith(OWN)}
    return Task(_command_line(kept), args.learning_rate, args.max_steps)


def _command_line(settings: dict[str, list[str]]) -> list[str]:
    flags = (
        [f"--{key}={values[0]}"] if len(values) == 1 else [f"--{key}", *values] for key, values in settings.items()
    )
    return [word for flag in flags for word in flag]
