"""The section "Training time" of the model card."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from histories import write_run
from huggingface_hub import ModelCard
from tiny_training import arguments, data, model

from hf_eva import EvaTrainer
from hf_eva.facts import saved_facts
from hf_eva.model_card import duration, write_training_section
from hf_eva.runs import Run

ROOT = Path(__file__).parents[1]


def card(folder, **changes) -> ModelCard:
    settings = {"eval_strategy": "steps", "eval_steps": 3, **changes}
    trainer = EvaTrainer(model(), arguments(folder, **settings), train_dataset=data(), eval_dataset=data())
    trainer.train()
    trainer.create_model_card(model_name="tiny", tasks="text-classification", tags="mine")
    return ModelCard.load(folder / "README.md")


def test_the_card_states_the_facts_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "my recipe.yaml", "--hub_token", "secret", "--hub-token=secret"])
    text = card(tmp_path, eva_damping=0.5, eva_rank=2).text
    section = text[text.index("### Training time") : text.index("### Framework versions")]
    for fact in (
        "s for 6 steps",
        "| evaluation |",
        "| total, with data loading and checkpoints |",
        "samples/s",
        "% |",
        "GiB |",
        "CPU thread",
        "hf_eva 0.1.0",
        "8 layers preconditioned",
        "`rank=2`, `damping=0.5`",
        "finetune.py 'my recipe.yaml' --hub_token '***' '--hub-token=***'",
    ):
        assert fact in section, fact
    assert "secret" not in text
    assert "- optimizer: eva, see the settings under Training time" in text
    assert "This model was trained from scratch on an unknown dataset." in text


def test_its_metadata_is_valid_and_complete(tmp_path):
    data = card(tmp_path).data
    assert data.tags == ["mine", "generated_from_trainer", "eva"]
    assert data.library_name == "transformers"
    assert "All settings are those of the default recipe." in (tmp_path / "README.md").read_text()


def test_writing_it_again_gives_one_section(tmp_path):
    trainer = EvaTrainer(model(), arguments(tmp_path), train_dataset=data())
    trainer.train()
    for _ in range(2):
        trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert text.count("### Training time") == text.count("### Framework versions") == text.count("\n- eva\n") == 1


def test_other_optimizers_get_their_time_and_no_tag(tmp_path):
    result = card(tmp_path, optim="adamw_torch")
    assert "eva" not in result.data.tags
    assert "The optimizer was `adamw_torch`." in result.text
    assert "### Training time" in result.text


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    trainer = EvaTrainer(model(), arguments(tmp_path), train_dataset=data())
    trainer.train()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not (tmp_path / "README.md").exists()


def facts_of(folder) -> dict:
    return json.loads((folder / "eva_run.json").read_text())


def test_a_card_by_hand_is_the_card_of_the_script(tmp_path):
    trainer = EvaTrainer(model(), arguments(tmp_path), train_dataset=data(), eval_dataset=data())
    trainer.card_defaults = {"dataset": "Made up tokens", "tasks": "text-classification"}
    trainer.train()
    trainer.evaluate()

    def written() -> str:
        text = (tmp_path / "README.md").read_text()
        return re.sub(r"\| peak memory.*", "", text)

    trainer.create_model_card()
    by_hand = written()
    trainer.create_model_card(dataset="Made up tokens", tasks="text-classification")
    assert written() == by_hand
    trainer.save_state()
    (tmp_path / "README.md").unlink()
    write_training_section(Run.read(tmp_path), saved_facts(tmp_path))
    section = by_hand[by_hand.index("### Training time") : by_hand.index("### Framework")]
    assert section.strip() in written()


@pytest.mark.parametrize("task", ["text-classification", "text-generation"])
def test_results_of_local_data_are_in_the_metadata(task, tmp_path):
    folder = write_run(tmp_path / "run", (0.7, 0.5), eval_accuracy=0.75, eval_majority_class=0.5)
    path = write_training_section(
        Run.read(folder), saved_facts(folder), None, {"dataset": "my own.csv", "tasks": task}
    )
    results = ModelCard.load(path).data.eval_results
    found = {result.metric_type: result.metric_value for result in results}
    perplexity = {"perplexity": pytest.approx(1.6487, abs=1e-4)} if task == "text-generation" else {}
    assert found == {"loss": 0.5, "accuracy": 0.75, **perplexity}
    assert {(r.task_type, r.dataset_name, r.dataset_type) for r in results} == {(task, "my own.csv", "my-own.csv")}


def test_results_that_the_stock_card_has_stay(tmp_path):
    folder = write_run(tmp_path / "run", eval_accuracy=0.75)
    path = write_training_section(Run.read(folder), saved_facts(folder), None, {"dataset": "a", "tasks": "b"})
    write_training_section(Run.read(folder), saved_facts(folder), None, {"dataset": "c", "tasks": "d"})
    assert {result.dataset_name for result in ModelCard.load(path).data.eval_results} == {"a"}


def test_the_card_compares_with_a_baseline(tmp_path):
    baseline = write_run(
        tmp_path / "adamw", (1.0, 10.0), facts={"optimizer": "adamw_torch", "hardware": "a large GPU"}
    )
    folder = tmp_path / "eva"
    text = card(folder, baseline_run=str(baseline)).text
    assert "steps to 10.0000, the last evaluation loss of adamw (adamw_torch), which took 5.0 s, 10 steps: 0." in text
    assert "| hardware of adamw | a large GPU: the times compare two machines |" in text
    assert {path.name for path in folder.glob("*.png")} == set(re.findall(r"!\[.*\]\((.*)\)", text))
    assert facts_of(folder)["target"]["steps"] == 3
    write_training_section(Run.read(write_state(folder)), saved_facts(folder))
    assert "the last evaluation loss of adamw" in (folder / "README.md").read_text()


def write_state(folder):
    history = [{"step": 3, "eval_loss": 0.7}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 3}))
    return folder


def test_a_baseline_that_was_better_is_not_reached(tmp_path):
    baseline, folder = (write_run(tmp_path / name, (loss,)) for name, loss in (("best", 0.1), ("run", 0.3)))
    text = write_training_section(Run.read(folder), saved_facts(folder), Run.read(baseline)).read_text()
    assert "| not reached: the best evaluation loss was 0.3000, the last evaluation loss of best 0.1000 after" in text


@pytest.mark.parametrize(("losses", "expected"), [(None, "there is no"), ((), "no evaluation loss")])
def test_a_baseline_that_cannot_be_compared_is_refused_before_the_training(losses, expected, tmp_path):
    baseline = tmp_path / "baseline" if losses is None else write_run(tmp_path / "baseline", losses)
    with pytest.raises(ValueError, match=expected):
        arguments(tmp_path / "run", baseline_run=str(baseline))


def test_pictures_are_embedded_where_there_is_something_to_draw(tmp_path):
    folder = tmp_path / "run"
    text = card(folder, save_strategy="steps", save_steps=3).text
    for name in ("loss.png", "loss-strength.png", "loss-spectra.png"):
        assert f"]({name})" in text and (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "loss-strength.png" not in card(tmp_path / "brief", eva_log_layers=False).text
    names = facts_of(folder)["layers"].values()
    assert {spectrum.layer for spectrum in Run.read(write_state(folder)).spectra()} == set(names)


def test_without_matplotlib_the_card_has_no_picture(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hf_eva.plots", raising=False)
    folder = write_run(tmp_path / "run")
    text = write_training_section(Run.read(folder), saved_facts(folder)).read_text()
    assert "### Training time" in text and ".png" not in text
    assert "pip install 'hf-eva[plot]'" in caplog.text


def test_a_run_of_the_stock_trainer_gets_a_card_of_what_is_known(tmp_path):
    folder = write_run(tmp_path / "stock", step_seconds=None)
    text = write_training_section(Run.read(folder), saved_facts(folder)).read_text()
    section = text[text.index("### Training time") : text.index("### Framework versions")]
    assert (
        "| evaluation | 4.0 s |\n| total, with data loading and checkpoints | 9.0 s |\n| throughput | 8.0" in section
    )
    for unknown in ("hardware", "The optimizer", "None", "```"):
        assert unknown not in section
    assert "| Training Loss |" in text and "eva" not in ModelCard(text).data.tags


def test_a_trainer_that_has_not_trained_keeps_what_was_noted(tmp_path):
    trainer = EvaTrainer(model(), arguments(tmp_path), train_dataset=data(), eval_dataset=data())
    trainer.create_model_card()
    assert "### Training time" not in (tmp_path / "README.md").read_text()
    trainer.train()
    trainer.save_state()
    EvaTrainer(model(), arguments(tmp_path), train_dataset=data(), eval_dataset=data()).create_model_card()
    assert "s for 6 steps" in (tmp_path / "README.md").read_text()


def test_energy_is_what_codecarbon_measured(tmp_path, monkeypatch):
    codecarbon = pytest.importorskip("codecarbon")
    tracker = partial(codecarbon.OfflineEmissionsTracker, country_iso_code="FRA", log_level="error")
    monkeypatch.setattr(codecarbon, "EmissionsTracker", tracker)  # the stock one asks the network where it is
    result = card(tmp_path, report_to=["codecarbon"])
    assert re.search(r"\| energy, estimated by CodeCarbon [\d.]+ \| [\d.e-]+ kWh .* g CO₂eq in France \|", result.text)
    assert result.data.co2_eq_emissions["source"] == "codecarbon"
    assert result.data.co2_eq_emissions["energy_consumed"] == facts_of(tmp_path)["energy"]["kwh"] > 0


class Started:
    """A process as psutil shows it."""

    def __init__(self, words: list[str], folder: Path, *parents: Started) -> None:
        self.cmdline, self.cwd, self.parents = (lambda: words), (lambda: str(folder)), (lambda: list(parents))


@pytest.mark.parametrize(
    ("launcher", "command"),
    [
        ("python3 /bin/accelerate launch --config_file a.yaml s.py", "accelerate launch --config_file a.yaml s.py"),
        ("python3 /bin/accelerate-launch --config_file=a.yaml s.py", "accelerate launch --config_file=a.yaml s.py"),
        ("python3 /bin/torchrun --nproc_per_node 2 s.py", "torchrun --nproc_per_node 2 s.py"),
        ("python3 -m torch.distributed.run s.py --token=s3", "torchrun s.py '--token=***'"),
        ("bash", "python s.py"),
    ],
)
def test_the_command_is_that_of_the_launcher(launcher, command, tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("num_processes: 2\nmain_process_ip: 10.0.0.1\ngpu_ids: null\n")
    shell = Started(["bash"], tmp_path)
    monkeypatch.setattr("psutil.Process", lambda: Started([], tmp_path, Started(launcher.split(), tmp_path), shell))
    monkeypatch.setattr("sys.argv", ["s.py"])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    text = card(tmp_path / "run").text
    assert f"```bash\n{command}\n```" in text
    assert ("by `a.yaml`:\n\n```yaml\nnum_processes: 2\n```" in text) == ("a.yaml" in command)


@pytest.mark.slow
def test_the_launcher_and_its_configuration_are_named(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        f"""import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from tiny_training import arguments, data, model
from hf_eva import EvaTrainer
trainer = EvaTrainer(model(), arguments(Path("out"), max_steps=1), train_dataset=data())
trainer.train()
trainer.create_model_card()
"""
    )
    shutil.copy(ROOT / "configs" / "accelerate" / "cpu_1.yaml", tmp_path / "one.yaml")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file=one.yaml",
        "train.py",
        "--api_key",
        "s3",
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "README.md").read_text()
    assert "```bash\naccelerate launch --config_file=one.yaml train.py --api_key '***'\n```" in text
    assert "Accelerate ran it as NO in 1 process, mixed precision no, by `one.yaml`:" in text
    config = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert config == yaml.safe_load((tmp_path / "one.yaml").read_text())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.26, "0.3 s"), (59.4, "59.4 s"), (61, "1 min 1 s"), (3725, "1 h 2 min 5 s")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
