"""The way to the Hub and back, with the real client and a stand-in that answers on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import local_hub, mistakes
from huggingface_hub import ModelCard

TESTS = Path(__file__).parent
PUSH = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from huggingface_hub import ModelCard
from tiny_training import arguments, data, model
from hf_eva import EvaTrainer
from hf_eva.cli import main

folder = Path("tiny-eva")
args = arguments(folder, push_to_hub=True, hub_model_id="tester/tiny-eva", eval_strategy="steps", eval_steps=3)
trainer = EvaTrainer(model(), args, train_dataset=data(), eval_dataset=data())
trainer.card_defaults = {{"dataset": "Made up tokens", "tasks": "text-classification"}}
trainer.train()
trainer.push_to_hub()
ModelCard.load(folder / "README.md").validate()
sys.exit(main(["plan", "tester/tiny-eva", "--json"]))
"""


@pytest.fixture
def environment(tmp_path):
    """Of a person who is logged in to the Hub that answers at the address given."""

    def make(url: str) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(TESTS.parent), os.environ.get("PYTHONPATH")]))
        own = {"HF_ENDPOINT": url, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": path}
        quiet = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return {**os.environ, **own, **quiet}

    return make


def test_a_push_brings_card_and_plot_and_the_plan_reads_them_back(environment, tmp_path):
    with local_hub() as hub:
        command = [sys.executable, "-c", PUSH.format(tests=str(TESTS))]
        options = {"env": environment(hub.url), "cwd": tmp_path, "capture_output": True, "text": True}
        done = subprocess.run(command, **options, timeout=300)
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout[done.stdout.index('{\n  "model"') :])
    pushed = hub.files["tester/tiny-eva"]
    assert hub.commits == ["End of training"]
    assert {"README.md", "config.json", "model.safetensors", "loss.png"} <= pushed.keys()
    assert pushed["loss.png"].startswith(b"\x89PNG")
    text = pushed["README.md"].decode()
    assert "### Training time" in text and "![Loss over steps and seconds of training](loss.png)" in text
    assert "hf_secret" not in text
    (result,) = ModelCard(text).data.eval_results
    assert (result.dataset_name, result.dataset_type) == ("Made up tokens", "Made-up-tokens")
    assert result.metric_type == "loss" and result.metric_value > 0
    assert planned["class"] == "BertForSequenceClassification"
    assert planned["preconditioned_layers"] == 8


def test_the_stand_in_refuses_results_as_the_hub_does():
    card = "---\nmodel-index:\n- name: a\n  results:\n  - task: {type: text-generation}\n---\n"
    assert len(mistakes(card)) == 3
    assert not mistakes("---\ntags: [eva]\n---\n")
