"""The YAML files of `scripts/compare.py`: those that are here, what makes two alike, and bad ones."""

import compare
import pytest
from compare_config import read_config
from running import ROOT, write

from hf_eva import EvaConfig

CONFIGS = sorted((ROOT / "configs" / "compare").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_comparison_is_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = read_config(str(path))
    assert config.name == path.stem
    assert {config.baseline, "eva"} <= set(config.optimizers)
    assert all(config.digest(task, name) for task in config.tasks for name in config.optimizers)


def test_the_digest_knows_what_makes_another_run(settings, tmp_path):
    def digest(**changes) -> str:
        return read_config(write(tmp_path, {**settings, **changes})).digest("images", "eva")

    first, task = digest(), settings["tasks"]["images"]
    default, same = {"adamw": {}, "eva": {}}, {"adamw": {}, "eva": {"rank": EvaConfig().rank}}
    assert digest(seeds=[7], lengths=[1], optimizers={"adamw": {}, "eva": {"rank": 2, "lr_ratio": 9}}) == first
    assert digest(tasks={"images": {**task, "learning_rate": 1, "max_steps": 9, "eva_rank": 3}}) == first
    assert digest(optimizers=default) == digest(optimizers=same) != first
    assert digest(tasks={"images": {**task, "weight_decay": 0.5}}) != first
    assert digest(evaluations=5) != first


# Bad input -----------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "key": ({"seed": [1]}, "unknown key 'seed' in the comparison, did you mean 'seeds'?"),
    "inner key": ({"tuning": {"seeds": [9], "bugdet": 3}}, "unknown key 'bugdet' in tuning, did you mean 'budget'?"),
    "missing": ({"tuning": {"budget": 3}}, "tuning has no 'seeds'"),
    "number": ({"evaluations": "many"}, "evaluations should be of type int, got 'many'"),
    "sign": ({"lengths": [1, -1]}, "lengths should be above 0, got '-1'"),
    "least": ({"timing": {"rounds": 0}}, "timing.rounds should be at least 1, got '0'"),
    "list": ({"seeds": 3}, "seeds should be a list with at least one value, got '3'"),
    "mapping": ({"optimizers": ["adamw"]}, "optimizers should hold lines like `name: ...`, got ['adamw']"),
    "baseline": (
        {"baseline": "adamv"},
        "baseline names 'adamv', which is not in this comparison, did you mean 'adam",
    ),
    "goals": ({"goals": {"adamw": {"image": 0.5}}}, "goals.adamw names 'image'"),
    "seeds": ({"seeds": [1, 100]}, "seed 100 is in seeds, and images is tuned on it"),
    "seeds of a task": ({"tasks": {"images": {"tuning_seeds": "x"}}}, "tasks.images.tuning_seeds should be a list"),
    "factor": ({"tuning": {"seeds": [100], "factor": 1}}, "tuning.factor should be above 1, got 1.0"),
    "length": ({"lengths": [0.5]}, "lengths should name 1, the whole schedule"),
    "name": ({"name": "../x"}, "name should be made of letters, digits, - and _, got '../x'"),
    "peer": (
        {"optimizers": {"adamw": {}, "eva": {}, "soup": {}}},
        "optimizers.soup is no known optimizer, did you",
    ),
    "option": ({"optimizers": {"adamw": {}, "eva": {"rnk": 2}}}, "optimizers.eva: "),
    "recipe": ({"tasks": {"images": {"recipe": "gone.yaml"}}}, "there is no recipe gone.yaml"),
    "argument": ({"tasks": {"images": {"tsk": "x"}}}, "unknown key 'tsk' in tasks.images, did you mean 'task'?"),
    "value": ({"tasks": {"images": {"task": "poetry"}}}, "tasks.images: argument --task: invalid choice: 'poetry'"),
    "steps": ({"tasks": {"images": {"task": "causal-lm"}}}, "tasks.images has no max_steps"),
    "flag": (["--tasks", "imges"], "--tasks names 'imges', which is not in this comparison, did you mean 'images'?"),
    "workers": (["--workers", "0"], "--workers must be at least 1, got 0"),
}


@pytest.mark.parametrize(("wrong", "expected"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_sentence(wrong, expected, settings, tmp_path, capsys):
    changes, flags = (wrong, []) if isinstance(wrong, dict) else ({}, wrong)
    with pytest.raises(SystemExit) as ended:
        compare.main([write(tmp_path, {**settings, **changes}), "--output", str(tmp_path / "out"), *flags])
    assert ended.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("compare.py: error: ")]
    assert expected in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "expected"), [("a: [", "is not YAML"), ("- a", "should hold lines like")])
def test_a_file_that_is_no_comparison(content, expected, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=expected):
        read_config(str(path))
    with pytest.raises(ValueError, match="there is no"):
        read_config(str(tmp_path / "gone.yaml"))
