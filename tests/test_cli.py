"""The command line `hf-eva`, as a shell and as a program meet it."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from histories import write_run
from huggingface_hub import ModelCard
from tiny_training import data, model, stock_arguments
from transformers import AutoConfig, BertConfig, Trainer

from hf_eva import plan, register, unregister
from hf_eva.cli import main

ROOT = Path(__file__).parents[1]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
}


@pytest.fixture
def said(capsys):
    """Runs a command line and returns its exit code, what it printed and what it complained about."""

    def run(*words: object) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def bert(tmp_path):
    """The folder of a configuration, without weights."""
    BertConfig(**SMALL, architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


# plan ----------------------------------------------------------------------------------------------------------------


def test_a_plan_needs_a_configuration_and_no_weights(bert, said):
    for place in (bert, bert / "config.json"):
        code, out, _ = said("plan", place)
        assert code == 0
        assert "bert.encoder.layer.{0-1}.attention.self.query  (×2)" in out
        assert "13 layers preconditioned" in out


def test_a_plan_as_json_is_the_plan(bert, said):
    from transformers import BertForMaskedLM

    code, out, _ = said("plan", bert, "--json", "--optim_args", "rank=2")
    found = json.loads(out)
    real = plan(BertForMaskedLM(AutoConfig.from_pretrained(bert)))
    assert code == 0 and found["class"] == "BertForMaskedLM"
    assert [one["name"] for one in found["layers"] if one["preconditioned"]] == [layer.name for layer in real.layers]
    assert found["adamw_bytes"] == real.adamw_bytes and found["state_bytes"] < real.state_bytes
    assert {one["reason"] for one in found["layers"]} >= {None, "embedding", "norm"}


def test_a_large_model_takes_no_memory(tmp_path, said):
    AutoConfig.for_model("llama", num_hidden_layers=80, hidden_size=8192, intermediate_size=28672).save_pretrained(
        tmp_path
    )
    code, out, _ = said("plan", tmp_path, "--model_class", "AutoModelForCausalLM", "--json")
    assert code == 0 and json.loads(out)["trainable_parameters"] > 6e10


def test_layers_and_class_can_be_chosen(bert, said):
    chosen = (
        "--model_class",
        "BertForSequenceClassification",
        "--include",
        "query",
        "classifier",
        "--exclude",
        "layer.0",
    )
    code, out, _ = said("plan", bert, *chosen, "--json")
    preconditioned = [one["name"] for one in json.loads(out)["layers"] if one["preconditioned"]]
    assert (code, preconditioned) == (0, ["bert.encoder.layer.1.attention.self.query", "classifier"])
    assert said("plan", bert, "--include", "all-linear")[0] == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model_class", "BertForNothing"], "has no class 'BertForNothing'"),
        (["--include", "qurey"], "matches no linear layer of the model: near misses are"),
        (["--optim_args", "rnk=8"], "did you mean 'rank'?"),
        (["--optim_args", "rank=0"], "rank"),
    ],
)
def test_a_wrong_choice_is_one_sentence_and_exit_code_2(words, expected, bert, said):
    code, out, err = said("plan", bert, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("hf-eva plan: error: ") and expected in err


def test_what_is_no_model_is_one_sentence_and_exit_code_2(tmp_path, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, expected in (
        (tmp_path, "no configuration could be read"),
        (tmp_path / "empty", "there is no config.json"),
        ("nobody/nothing", "no configuration could be read from 'nobody/nothing'"),
    ):
        code, _, err = said("plan", name)
        assert (code, err.count("\n")) == (2, 1) and expected in err


# plot and card -------------------------------------------------------------------------------------------------------


def test_plot_names_the_files_that_it_wrote(tmp_path, said):
    one, two = (write_run(tmp_path / name, strengths=True) for name in ("one", "two"))
    assert said("plot", one)[:2] == (0, f"{one}/loss.png\n{one}/loss-strength.png\n")
    code, out, _ = said("plot", one, two, "--output", tmp_path / "both.svg", "--dark", "--json")
    assert code == 0
    assert [Path(name).name for name in json.loads(out)] == ["both.svg", "both-strength-1.svg", "both-strength-2.svg"]
    assert "#0d1117" in (tmp_path / "both.svg").read_text()


def test_the_script_is_the_command(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["plot.py", str(folder)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "plot.py"), run_name="__main__")
    assert (ended.value.code, capsys.readouterr().out.strip()) == (0, str(folder / "loss.png"))


@pytest.mark.parametrize("words", [["plot"], ["card"], ["card", "--json"]])
def test_a_folder_without_a_run_is_exit_code_2(words, tmp_path, said):
    code, out, err = said(*words, tmp_path)
    assert (code, out) == (2, "") and "trainer_state.json: name the output folder of a run" in err
    assert not (tmp_path / "README.md").exists()


def test_without_matplotlib_plot_says_what_to_install(tmp_path, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hf_eva.plots", raising=False)
    code, _, err = said("plot", write_run(tmp_path / "run"))
    assert (code, err) == (
        1,
        "hf-eva plot: error: this needs matplotlib, which is not installed: pip install 'hf-eva[plot]'\n",
    )


def test_card_writes_the_section_once_with_baseline_and_results(tmp_path, said):
    run, baseline = write_run(tmp_path / "eva", eval_f1=0.9), write_run(tmp_path / "adamw", (0.9, 0.6))
    assert said("card", run)[:2] == (0, f"{run}/README.md\n")
    words = ("--baseline_run", baseline, "--dataset", "mine", "--task", "text-classification", "--json")
    code, out, _ = said("card", run, *words)
    facts = json.loads(out)
    assert code == 0 and facts["target"]["ratio"] == 0.5
    assert facts == json.loads((run / "eva_run.json").read_text())
    card = ModelCard.load(run / "README.md")
    assert card.text.count("### Training time") == card.text.count("### Framework versions") == 1
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {"loss": 0.4, "f1": 0.9}


def test_card_knows_what_a_stock_trainer_did_with_eva(tmp_path, said):
    register()
    try:
        args = stock_arguments(tmp_path, optim="eva", optim_args="rank=2", logging_steps=3)
        trainer = Trainer(model(), args, train_dataset=data())
        trainer.train()
        trainer.save_state()
        trainer.create_model_card()
    finally:
        unregister()
    assert said("card", tmp_path)[0] == 0
    card = ModelCard.load(tmp_path / "README.md")
    assert "eva" in card.data.tags and "- optimizer: eva, see the settings under Training time" in card.text
    assert "8 layers preconditioned" in card.text and "`rank=2`" in card.text and "CPU thread" in card.text
    assert "s for 6 steps" in card.text


def test_card_leaves_the_rest_of_a_card_alone(tmp_path, said):
    run = write_run(tmp_path / "run")
    (run / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\n### Training time\n\nold\n\n## After\n\nkept\n")
    assert said("card", run)[0] == 0
    card = ModelCard.load(run / "README.md")
    assert card.data.license == "mit" and card.text.startswith("# Mine") and "old" not in card.text
    assert "## After\n\nkept" in card.text and "| throughput | 8.0 samples/s |" in card.text


# doctor and the shell ------------------------------------------------------------------------------------------------


def test_doctor_tells_what_will_be_used(said):
    try:
        code, out, _ = said("doctor")
        assert code == 0
        assert "transformers" in out and "a step of Eva" in out and "problem" not in out
        code, out, _ = said("doctor", "--json")
        found = json.loads(out)
        assert (code, found["ok"], found["optim_eva"], found["step"]) == (0, True, True, True)
        assert found["versions"]["torch"] and found["use"]["device"] and found["devices"]
    finally:
        unregister()


def test_doctor_names_a_version_that_does_not_fit(said, monkeypatch):
    from importlib import metadata

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.0.0" if name == "transformers" else real(name))
    monkeypatch.setattr(metadata, "requires", lambda _: ["transformers>=5.6,<6 ; extra == 'trainer'"])
    try:
        code, out, _ = said("doctor")
    finally:
        unregister()
    assert code == 1
    assert "problem" in out and "transformers 4.0.0 is installed and transformers<6,>=5.6 is supported" in out


def test_doctor_names_a_step_that_fails(said, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("hf_eva.optimizer.Eva.step", broken)
    try:
        code, out, _ = said("doctor", "--json")
    finally:
        unregister()
    found = json.loads(out)
    assert (code, found["ok"], found["step"]) == (1, False, False)
    assert "failed: no kernel image is available" in found["problems"][0]


@pytest.mark.parametrize(
    ("words", "code"), [([], 2), (["nonsense"], 2), (["--help"], 0), (["plan"], 2), (["--version"], 0)]
)
def test_usage_has_the_exit_codes_of_a_shell(words, code, said):
    assert said(*words)[0] == code


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["plot", str(run)]) == 0
        print("what Python still has to say goes nowhere, and not into the pipe")
