"""`scripts/finetune.py`, from its arguments to the files of a finished run."""

import json
import shutil
from pathlib import Path

import finetune
import pytest
import transformers
import yaml
from finetune import HUB_TASKS
from huggingface_hub import ModelCard
from recipe import parse_arguments
from running import PYTHON, ROOT, TORCHRUN_2, launch

from hf_eva import EvaTrainingArguments

TEXT, LM, IMAGE = TASKS = ("sequence-classification", "causal-lm", "image-classification")
KINDS = (finetune.ModelArguments, finetune.DataArguments, EvaTrainingArguments)
SCRIPT = ROOT / "scripts" / "finetune.py"
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
FILES = {
    "README.md",
    "all_results.json",
    "config.json",
    "eva_run.json",
    "eval_results.json",
    "loss-spectra.png",
    "loss.png",
    "model.safetensors",
    "train_results.json",
    "trainer_state.json",
}
PROCESSOR_FILE = {TEXT: "tokenizer.json", LM: "tokenizer.json", IMAGE: "preprocessor_config.json"}


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def history(folder: Path, key: str) -> list[float]:
    return [entry[key] for entry in read(folder, "trainer_state.json")["log_history"] if key in entry]


def need_image_processor(task: str) -> None:
    if task == IMAGE and "torchvision" in getattr(transformers.AutoImageProcessor, "_backends", ()):
        pytest.skip(f"transformers {transformers.__version__} loads image processors with torchvision only")


# A whole run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TASKS)
def finished(request, tiny, tmp_path_factory) -> tuple[str, Path]:
    """The task and the output folder of a run of four steps, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    finetune.main([*tiny(request.param), "--max_steps", "4", "--save_steps", "2", "--output_dir", str(folder)])
    return request.param, folder


def test_a_run_leaves_model_results_plot_and_card(finished):
    task, folder = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= FILES | {PROCESSOR_FILE[task], "checkpoint-2", "checkpoint-4"}
    assert len(history(folder, "loss")) == 4
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(folder / "README.md")
    assert "### Training time" in card.text and "](loss-spectra.png)" in card.text
    wanted = {"loss", "perplexity"} if task == LM else {"accuracy", "f1"}
    assert {result.metric_type for result in card.data.eval_results} >= wanted
    assert {result.task_type for result in card.data.eval_results} == {HUB_TASKS.get(task, task)}
    results = read(folder, "all_results.json")
    metrics = {"perplexity"} if task == LM else {"eval_accuracy", "eval_f1", "eval_majority_class"}
    assert results.keys() >= {"train_loss", "eval_loss", "train_steps_seconds", "script_seconds"} | metrics


def test_the_saved_model_loads_again(finished, files):
    task, folder = finished
    need_image_processor(task)
    if task == IMAGE:
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        assert processor.size["height"] == 8
        model = transformers.AutoModelForImageClassification.from_pretrained(folder)
        assert model.config.id2label == {0: "dark", 1: "light"}
    elif task == LM:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.vocab_size == len(tokenizer)
        assert tokenizer.decode(tokenizer("a lovely film")["input_ids"]) == "a lovely film"
    else:
        assert transformers.AutoTokenizer.from_pretrained(folder).pad_token_id is not None
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.config.id2label == {0: "awful", 1: "lovely"}


def test_a_resumed_run_equals_an_uninterrupted_one(finished, tiny, tmp_path):
    task, folder = finished
    interrupted = tmp_path / "interrupted"
    shutil.copytree(folder / "checkpoint-2", interrupted / "checkpoint-2")
    more = ["--max_steps", "4", "--resume_from_checkpoint", "last", "--output_dir", str(interrupted)]
    finetune.main([*tiny(task), *more])
    assert history(interrupted, "loss") == history(folder, "loss")
    assert history(interrupted, "eval_loss") == history(folder, "eval_loss")


def test_the_output_ends_with_a_table_and_begins_with_the_plan(tiny, tmp_path, capsys):
    finetune.main([*tiny(TEXT), "--output_dir", str(tmp_path / "run")])
    lines = capsys.readouterr().out.splitlines()
    assert any("layers preconditioned" in line for line in lines)
    assert [line.split()[0] for line in lines[-2:]] == ["plot", "card"]
    assert any(line.startswith("accuracy of naming the majority class") for line in lines)


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows.parquet"])
def test_tables_can_be_given_for_training_and_evaluation(name, tiny, files, tmp_path):
    data = ["--train_file", f"{files}/{name}", "--validation_file", f"{files}/{name}", "--max_eval_samples", "7"]
    finetune.main([*tiny(TEXT), *data, "--output_dir", str(tmp_path), "--optim", "adamw_torch"])
    assert read(tmp_path, "config.json")["id2label"] == {"0": "awful", "1": "lovely"}
    assert "The optimizer was `adamw_torch`" in (tmp_path / "README.md").read_text()


def test_two_image_folders(tiny, files, tmp_path):
    more = ["--validation_dir", f"{files}/images", "--output_dir", str(tmp_path)]
    finetune.main([*tiny(IMAGE), *more])
    assert read(tmp_path, "eval_results.json")["eval_majority_class"] == 0.5


def test_a_saved_model_is_fine_tuned_further(finished, tiny, tmp_path):
    task, folder = finished
    need_image_processor(task)
    arguments = tiny(task)
    del arguments[2:6]  # the model from scratch
    finetune.main([*arguments, "--model_name_or_path", str(folder), "--output_dir", str(tmp_path)])
    assert history(tmp_path, "eval_loss")[0] < history(folder, "eval_loss")[0]


def test_overwrite_output_dir(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    arguments = [*tiny(IMAGE), "--output_dir", str(tmp_path), "--overwrite_output_dir", "true"]
    finetune.main(arguments)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model.safetensors").exists()


# Several processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one_with_twice_the_batch(tiny, tmp_path):
    arguments = [*tiny(IMAGE), "--per_device_train_batch_size"]
    finetune.main([*arguments, "8", "--output_dir", str(tmp_path / "one")])
    done = launch(*TORCHRUN_2, SCRIPT, *arguments, "4", "--output_dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert "num_devices: 2" in (tmp_path / "two" / "README.md").read_text()
    assert history(tmp_path / "two", "loss") == pytest.approx(history(tmp_path / "one", "loss"), rel=1e-3)
    assert done.stdout.count("layers preconditioned") == 1
    assert done.stdout.count("card  ") == 1


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_into_what_it_says(path):
    model_args, data_args, training_args = parse_arguments(KINDS, [str(path)], "")
    recipe = yaml.safe_load(path.read_text())
    assert training_args.optim == recipe["optim"] == "eva"
    assert training_args.learning_rate == float(recipe["learning_rate"])
    assert data_args.task == recipe["task"]
    assert model_args.model_name_or_path == recipe.get("model_name_or_path")
    assert 0 < training_args.warmup_steps < 1


def test_the_command_line_overrides_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "task: causal-lm\nlearning_rate: 1e-4\nsave_strategy: no\neva_exclude: [a, b]\nseed: 3\nrun_name:\nbf16: yes\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    command_line = ["--learning_rate", "3e-4", "--eva_exclude", "c", "--output_dir", "runs/x"]
    _, data_args, args = parse_arguments(KINDS, [str(recipe), *command_line], "")
    assert (data_args.task, args.learning_rate, args.eva_exclude) == ("causal-lm", 3e-4, ["c"])
    assert (args.save_strategy, args.seed, args.bf16, args.run_name) == ("no", 3, True, None)
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize("name", ["report_to", "optim_target_modules"])
def test_one_word_stays_a_word_and_several_are_a_list(name, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for written, found in (
        ("tensorboard", "tensorboard"),
        ("[tensorboard, codecarbon]", ["tensorboard", "codecarbon"]),
    ):
        recipe.write_text(f"task: causal-lm\n{name}: {written}\n")
        for argv in ([str(recipe)], [f"--{name}", *written.strip("[]").split(", "), "--task", "causal-lm"]):
            _, _, args = parse_arguments(KINDS, [*argv, "--output_dir", str(tmp_path)], "")
            wanted = [found] if name == "report_to" and isinstance(found, str) else found  # by TrainingArguments
            assert getattr(args, name) == wanted


# Bad input -----------------------------------------------------------------------------------------------------------

# A task, what is added to the arguments of its tiny run, and what the sentence has to say.
BAD_INPUT = {
    "argument": (TEXT, "--learning_rat 1", "unknown argument '--learning_rat', did you mean 'learning_rate'?"),
    "choice": (TEXT, "--eval_strategy sometimes", "'sometimes' (choose from 'no', 'steps', 'epoch')"),
    "number": (TEXT, "--learning_rate fast", "--learning-rate: invalid float value: 'fast'"),
    "negative": (TEXT, "--learning_rate -1", "--learning_rate must be at least 0, got -1"),
    "nan": (TEXT, "--weight_decay nan", "--weight_decay must be at least 0, got nan"),
    "batch": (TEXT, "--per_device_train_batch_size 0", "--per_device_train_batch_size must be at least 1, got 0"),
    "damping": (TEXT, "--eva_damping 0", "damping must be in (0, inf)"),
    "variant": (TEXT, "--eva_variant newton", "'newton' (choose from 'eva'"),
    "optim_args": (TEXT, "--optim_args dampin=1", "did you mean 'damping'"),
    "optim": (TEXT, "--optim adamm", "adamm is not a valid"),
    "include": (TEXT, "--optim_target_modules atention", "matches no linear layer"),
    "exclude": (TEXT, "--eva_exclude .*", "has no layer to precondition"),
    "report_to": (TEXT, "--report_to nowhere", "nowhere is not supported"),
    "no data": (TEXT, "--train_file gone.csv", "there is no gone.csv"),
    "format": (TEXT, "--train_file {files}/images/dark/0.png", "should end in one of .csv, .json"),
    "broken data": (TEXT, "--train_file {bad}/broken.json", "broken.json: JSON parse error"),
    "empty data": (TEXT, "--train_file {bad}/empty.csv", "could not read"),
    "empty folder": (IMAGE, "--train_dir {bad}", "could not read"),
    "holes": (TEXT, "--train_file {bad}/holes.csv", "column 'label' of the train data is empty in 1 rows"),
    "one class": (TEXT, "--train_file {bad}/one.csv", "column 'label' holds one class, 'x'"),
    "new class": (TEXT, "--validation_file {bad}/one.csv", "label 'x' in column 'label' is none of"),
    "column": (TEXT, "--text_column sentence", "have no column 'sentence' but text, label: set --text_column"),
    "column type": (IMAGE, "--image_column label", "column 'label' cannot be the --image_column"),
    "no rows": (TEXT, "--max_train_samples 0", "the train data have no rows"),
    "split": (TEXT, "--validation_split_percentage 100", "must be 1 to 99, got 100"),
    "two sources": (TEXT, "--dataset_name embedded:digits", "exactly one of --dataset_name, --train_file"),
    "embedded": (
        LM,
        "--train_file= --dataset_name embedded:novels",
        "there is no 'embedded:novels', only embedded:movie",
    ),
    "no baseline": (TEXT, "--baseline_run nowhere", "there is no nowhere/trainer_state.json"),
    "hub data": (LM, "--train_file= --dataset_name nobody/nothing", "nobody/nothing"),
    "two models": (TEXT, "--model_name_or_path embedded:minilm", "either --model_name_or_path or --model_type"),
    "hub model": (LM, "--model_type= --config_overrides= --model_name_or_path nobody/nothing", "nobody/nothing"),
    "model type": (LM, "--model_type gpt22", "unknown --model_type 'gpt22', did you mean 'gpt2'?"),
    "model task": (LM, "--model_type vit --config_overrides=", "Unrecognized configuration class"),
    "overrides": (LM, "--config_overrides n_layers=2", "--config_overrides do not fit a gpt2: key n_layers"),
    "block size": (LM, "--block_size 64", "--block_size 64 is more than the 32 positions of the model"),
    "short text": (LM, "--max_eval_samples 1", "the validation text is shorter than one block of 16 tokens"),
    "sequence": (TEXT, "--max_seq_length 9999", "--max_seq_length 9999 is more than the 512 positions of the model"),
    "no tokenizer": (TEXT, "--tokenizer_name=", "a text classifier from scratch needs a --tokenizer_name"),
    "no checkpoint": (TEXT, "--resume_from_checkpoint last", "there is no checkpoint to resume from in"),
    "gone checkpoint": (TEXT, "--resume_from_checkpoint {bad}", "there is no checkpoint to resume from in"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "broken.json").write_text("{text\n")
    (folder / "empty.csv").write_text("")
    (folder / "holes.csv").write_text("text,label\na,x\nb,\nc,y\n")
    (folder / "one.csv").write_text("text,label\n" + "a,x\n" * 9)
    return folder


def refusal(arguments: list[str], output_dir: Path, capsys) -> str:
    """The sentence with which a run ends before it begins."""
    before = sorted(output_dir.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        finetune.main([*arguments, "--output_dir", str(output_dir)])
    assert ended.value.code == 2
    assert sorted(output_dir.rglob("*")) == before
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune.py: error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize(("task", "added", "expected"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_sentence_before_anything_is_written(
    task, added, expected, tiny, files, bad, tmp_path, capsys, offline
):
    arguments = [*tiny(task), *added.format(files=files, bad=bad).split()]
    assert expected in refusal(arguments, tmp_path / "run", capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat' in {}, did you mean 'learning_rate'?"),
        ("- a list", "{} is no recipe"),
        ("a: [", "{} is not YAML"),
        (None, "there is no recipe {}"),
    ],
)
def test_a_bad_recipe(recipe, expected, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    if recipe:
        path.write_text(recipe)
    assert expected.format(path) in refusal([str(path)], tmp_path / "run", capsys)


def test_a_folder_with_files_is_refused_and_left_alone(tiny, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert f"{tmp_path} is not empty" in refusal(tiny(TEXT), tmp_path, capsys)


def test_a_command_ends_with_the_sentence_and_exit_code_2(tmp_path):
    done = launch(*PYTHON, SCRIPT, "--task", "poetry", "--output_dir", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("finetune.py: error: argument --task: invalid choice: 'poetry'")
    assert "Traceback" not in done.stderr
