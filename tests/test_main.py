"""`python -m hf_eva SCRIPT`, also under the launchers of accelerate and torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import assert_near, difference
from safetensors.torch import load_file
from tiny_training import arguments, data, model

import hf_eva.__main__
from hf_eva import EvaTrainer

TESTS = Path(__file__).parent
EXAMPLE = os.path.relpath(TESTS / "example_script.py", TESTS.parent)
TRAINING = ["--use_cpu", "--max_steps", "4", "--learning_rate", "1e-3", "--report_to", "none"]
EVA = ["--optim", "eva", "--optim_args", "rank=2,damping=0.1"]
LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--main_process_port=0", "--num_processes"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node"],
}


def run(*command: str, cwd=TESTS.parent) -> subprocess.CompletedProcess[str]:
    """Run `python` with a command, on one thread for each process."""
    paths = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    quiet = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment = {**os.environ, **quiet}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


def facts(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"argv"')]
    return json.loads(line)


def test_a_script_trains_with_eva_as_eva_trainer_does(tmp_path):
    command = [EXAMPLE, "--output_dir", str(tmp_path / "script"), *TRAINING, *EVA]
    found = facts(run("-m", "hf_eva", *command))
    assert found["argv"] == command
    assert (found["optim"], found["optimizer"], found["rank"]) == ("eva", "Eva", 2)
    args = arguments(tmp_path, max_steps=4, optim_args="rank=2,damping=0.1")
    trainer = EvaTrainer(model(), args, train_dataset=data(16), eval_dataset=data(16))
    trainer.train()
    assert found["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def trained(folder, processes, *launcher):
    """The weights after a training on batches of 8 in all."""
    command = [*launcher, "-m", "hf_eva", EXAMPLE, "--output_dir", str(folder), *TRAINING, *EVA, "--dropout", "0"]
    # What the stock Trainer makes of a mean loss has another scale on several processes, which clipping would notice.
    found = facts(run(*command, "--max_grad_norm", "0", "--per_device_train_batch_size", str(8 // processes)))
    assert (found["world"], found["optimizer"], found["argv"][0]) == (processes, "Eva", EXAMPLE)
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("one"), 1)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("launcher", "processes"), [("accelerate", 2), ("accelerate", 4), ("torchrun", 4)])
def test_several_processes_run_a_script_as_one_does(launcher, processes, tmp_path, of_one_process):
    found = trained(tmp_path, processes, "-m", *LAUNCHERS[launcher], str(processes))
    assert difference(of_one_process, model().state_dict())[1] > 1e-4
    # Entries without a gradient, such as biases of keys, go where rounding sends them.
    assert_near(found, of_one_process, 2e-3, 1e-6)


def test_the_help_is_the_help_of_the_script():
    done = run("-m", "hf_eva", EXAMPLE, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: example_script.py")
    assert ",eva}" in done.stdout and "Sequences to train on." in done.stdout


SURROUNDINGS = """
import multiprocessing, os, sys
from neighbour import ANSWER
def double(number):
    return 2 * number
if __name__ == "__main__":
    print(sys.argv, sys.path[0], __file__, __spec__, sys.modules["__main__"].double is double, __doc__, ANSWER)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(double, [ANSWER]))
    double()
"""


@pytest.mark.parametrize("script", ["link.py", "scripts/../scripts/script.py"])
def test_a_script_finds_what_it_finds_under_python(script, tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "neighbour.py").write_text("ANSWER = 42")
    (tmp_path / "scripts" / "script.py").write_text(SURROUNDINGS)
    (tmp_path / "link.py").symlink_to(tmp_path / "scripts" / "script.py")
    alone, done = (run(*prefix, script, "--flag", cwd=tmp_path) for prefix in ((), ("-m", "hf_eva")))
    # Packages that are imported on the way may say what they lack on a machine.
    said = run("-c", "import hf_eva; hf_eva.register()", cwd=tmp_path).stderr
    assert (done.returncode, done.stdout, done.stderr) == (alone.returncode, alone.stdout, said + alone.stderr)
    assert done.stdout.endswith("[84]\n") and done.stderr.count("File") == 1, done.stderr


ENDS = {
    "an exception": "def f():\n    raise ValueError('boom')\nf()",
    "a chain of exceptions": "try:\n    1 / 0\nexcept Exception as error:\n    raise KeyError('boom') from error",
    "a code": "import sys; sys.exit(7)",
    "a message": "import sys; sys.exit('boom')",
    "an interrupt": "raise KeyboardInterrupt",
    "no syntax": "print('boom'",
    "a hook of its own": "import sys, traceback as t\n"
    "sys.excepthook = lambda kind, value, tb: print(kind, t.extract_tb(tb), t.format_exception(value))\n1 / 0",
}


@pytest.mark.parametrize("source", ENDS.values(), ids=ENDS)
def test_a_script_ends_as_under_python(source, tmp_path):
    (tmp_path / "script.py").write_text(source)
    # Without what comes before the script, which loads all of transformers.
    code = f"import runpy; runpy.run_path({hf_eva.__main__.__file__!r})['run']({str(tmp_path / 'script.py')!r})"
    alone, done = run("script.py", cwd=tmp_path), run("-c", code, cwd=tmp_path)
    assert done.returncode
    assert (done.returncode, done.stdout, done.stderr) == (alone.returncode, alone.stdout, alone.stderr)


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["missing.py"], 2)])
def test_without_a_script_it_says_how_to_use_it(arguments, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf_eva", *arguments])
    assert hf_eva.__main__.main() == code
    assert "usage: python -m hf_eva SCRIPT" in "".join(capsys.readouterr())


def test_an_unknown_transformers_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf_eva", EXAMPLE])
    monkeypatch.setitem(sys.modules, "transformers.trainer_optimizer", None)
    assert hf_eva.__main__.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf_eva: cannot add 'eva' to the optimizers of transformers ")
    assert "install transformers>=5.6,<6" in line
