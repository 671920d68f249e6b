"""Small files for the scripts to read, and the arguments of runs that take seconds."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import ROOT

pytest.importorskip("datasets")
pytest.importorskip("transformers")
sys.path.insert(0, str(ROOT / "scripts"))

from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image
from task_data import train_tokenizer
from transformers import AutoTokenizer, BertConfig, BertModel

MODELS = {
    "sequence-classification": "bert hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64",
    "causal-lm": "gpt2 n_layer=1,n_head=2,n_embd=32,n_positions=32",
    "image-classification": "vit image_size=8,patch_size=4,hidden_size=32,num_hidden_layers=1,num_attention_heads=2,"
    "intermediate_size=64",
}

COMPARISON = {
    "name": "tiny",
    "seeds": [0, 1],
    "lengths": [1, 0.5],
    "evaluations": 2,
    "baseline": "adamw",
    "tuning": {"seeds": [100], "budget": 3, "factor": 4},
    "sweep": {"optimizers": ["adamw", "eva"], "factors": [0.25, 1, 1e9]},
    "timing": {"rounds": 2, "steps": 2},
    "highlight": ["eva"],
    "goals": {"adamw": {"images": 100}},
    "optimizers": {"adamw": {}, "eva": {"rank": 2}},
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a network, whatever the environment says."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rows.csv`, `.json`, `.parquet`, `.txt`, an image folder `images` and a `tokenizer`."""
    folder = tmp_path_factory.mktemp("files")
    words = ["awful", "lovely"]
    texts = [f"film number {i} is {words[i % 2]} and {words[i % 2]} again" for i in range(60)]
    rows = Dataset.from_dict({"text": texts, "label": [words[i % 2] for i in range(60)]})
    rows.to_csv(folder / "rows.csv")
    rows.to_json(folder / "rows.json")
    rows.to_parquet(folder / "rows.parquet")
    (folder / "rows.txt").write_text("\n".join(texts * 4))
    train_tokenizer(rows, "text", 300).save_pretrained(folder / "tokenizer")
    for i in range(40):
        image = folder / "images" / ("dark", "light")[i % 2] / f"{i}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (10, 9), color=i + 200 * (i % 2)).save(image)
    return folder


@pytest.fixture(scope="session")
def tiny(files: Path) -> Callable[[str], list[str]]:
    """The arguments of a run of two steps, seconds long, for a task."""
    data = {
        "sequence-classification": ["--train_file", f"{files}/rows.csv", "--tokenizer_name", f"{files}/tokenizer"],
        "causal-lm": ["--train_file", f"{files}/rows.txt", "--block_size", "16", "--vocab_size", "300"],
        "image-classification": ["--train_dir", f"{files}/images"],
    }

    def arguments(task: str) -> list[str]:
        model_type, overrides = MODELS[task].split()
        model = ["--model_type", model_type, "--config_overrides", overrides]
        training = "--max_steps 2 --logging_steps 1 --learning_rate 1e-3 --eval_strategy steps --eval_steps 1"
        return ["--task", task, *model, *data[task], "--validation_split_percentage", "20", *training.split()]

    return arguments


@pytest.fixture
def settings(tiny) -> dict:
    """A comparison on tiny images."""
    words = iter(tiny("image-classification"))
    task = {key.removeprefix("--"): value for key, value in zip(words, words, strict=True)}
    return {**COMPARISON, "tasks": {"images": {**task, "max_steps": 6, "per_device_train_batch_size": 4}}}


@pytest.fixture(scope="session")
def tiny_loop(files: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a run of `finetune_no_trainer.py` over two epochs: a small BERT and its data, in folders."""
    folder = tmp_path_factory.mktemp("no_trainer")
    tokenizer = AutoTokenizer.from_pretrained(files / "tokenizer")
    tokenizer.save_pretrained(folder / "model")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=0)).save_pretrained(folder / "model")
    rows = Dataset.from_csv(str(files / "rows.csv")).cast_column("label", ClassLabel(names=["awful", "lovely"]))
    for name, split in DatasetDict(train=rows.select(range(48)), validation=rows.select(range(48, 60))).items():
        (folder / "data").mkdir(exist_ok=True)
        split.to_parquet(folder / "data" / f"{name}.parquet")
    settings = {"model_name_or_path": folder / "model", "dataset_name": folder / "data", "max_seq_length": 16}
    more = {"batch_size": 8, "learning_rate": 3e-3, "eva_options": "rank=2,damping=0.1"}
    return [word for name, value in {**settings, **more}.items() for word in (f"--{name}", str(value))]
