"""The section "Training time" of the model card."""

from __future__ import annotations

import sys

import pytest
from huggingface_hub import ModelCard
from tiny_training import arguments, data, model

from hf_eva import EvaTrainer


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


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.26, "0.3 s"), (59.4, "59.4 s"), (61, "1 min 1 s"), (3725, "1 h 2 min 5 s")]
)
def test_durations_read_well(seconds, text):
    from hf_eva.model_card import _duration

    assert _duration(seconds) == text
