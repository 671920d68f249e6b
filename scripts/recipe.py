"""Arguments of a script from a recipe and the command line, where every mistake is one sentence and a `ValueError`."""

import difflib
import json
import os
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import fields
from itertools import chain
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser

# Smallest values of what transformers and torch would only refuse when the training has begun.
LEAST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}


# What may be a word or a list of words, of which HfArgumentParser takes the word alone.
ONE_OR_MORE = ("--report_to", "--optim_target_modules")


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the default of every argument, and leaves the lines of the description alone."""


class OneOrMore(Action):
    """Keeps one word as it is, and several as a list."""

    def __call__(self, parser: Any, namespace: Any, values: list[str], option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


class ArgumentParser(HfArgumentParser):
    def add_argument(self, *names: str, **options: Any) -> Action:
        several = {"nargs": "+", "action": OneOrMore} if names[0] in ONE_OR_MORE else {}
        return super().add_argument(*names, **options, **several)

    def error(self, message: str):
        raise ValueError(message)  # argparse would print 200 lines of usage first


def near_miss(word: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


def read_yaml(path: str, what: str) -> Any:
    """Returns the content of a YAML file, `what` to its user; every value stays text."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no {what} {path}")
    with open(path, encoding="utf-8") as file:
        try:
            # BaseLoader leaves a value as it is written: YAML would read `no` as False, and `1e-4` as a string.
            return yaml.load(file, Loader=yaml.BaseLoader)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error


def read_recipe(path: str, known: list[str]) -> list[str]:
    """Turns a YAML file into command-line arguments, so that one parser checks and converts both.

    Args:
        path (`str`): Lines of the form `key: value`, where a value may be a list, a mapping or empty.
        known (`list[str]`): The keys it may hold.
    """
    recipe = read_yaml(path, "recipe")
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is no recipe: it should hold lines like `learning_rate: 1e-4`")
    arguments = []
    for key, value in recipe.items():
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {path}{near_miss(key, known)}")
        if isinstance(value, list):
            arguments += [f"--{key}", *value]
        elif value not in ("", "null"):
            arguments.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return arguments


def parse_arguments(kinds: tuple[type, ...], argv: list[str], description: str) -> tuple:
    """Returns one instance of each dataclass in `kinds`; `argv` is `[RECIPE] [--key value ...]`, the latter wins."""
    usage = "%(prog)s [RECIPE.yaml] [--argument value ...]"
    parser = ArgumentParser(
        kinds, usage=usage, description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    # Otherwise, where there is no accelerator, the processes of torchrun train side by side and never talk.
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())
    known = [field.name for kind in kinds for field in fields(kind)]
    if argv and not argv[0].startswith("-"):
        argv = read_recipe(argv[0], known) + argv[1:]
    *arguments, rest = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}{near_miss(rest[0].lstrip('-').split('=')[0], known)}")
    for name, value in chain(*(vars(argument).items() for argument in arguments)):
        if name in LEAST and not value >= LEAST[name]:  # so that it refuses nan
            raise ValueError(f"--{name} must be at least {LEAST[name]}, got {value}")
    return tuple(arguments)
