"""The data of a training script: where they come from, and whether their columns are what the task needs."""

import os
from dataclasses import dataclass, field
from itertools import chain, product
from typing import Any, Literal

import datasets
import embedded
from datasets import DatasetDict
from datasets.exceptions import DatasetsError
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

FILE_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
COLUMN_TYPES = {
    "text_column": ("string", "large_string"),
    "image_column": ("PIL.",),
    "label_column": ("string", "large_string", "int", "uint", "bool"),
}
END_OF_TEXT = "<|endoftext|>"
SUBSET_SEED = 0  # a split or a limited number of examples is the same in every run, whatever its --seed


@dataclass
class DataArguments:
    task: Literal["sequence-classification", "causal-lm", "image-classification"] = field(
        metadata={"help": "What the model learns."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name, folder, or `embedded:` and a name that `embedded.py` lists."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "A csv, json, jsonl, parquet or txt file."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for the evaluation."})
    train_dir: str | None = field(default=None, metadata={"help": "Image folder with a subfolder for every class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for the evaluation."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training data to hold out when there is no validation split."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes: numbers or names."})
    max_seq_length: int = field(default=128, metadata={"help": "Length at which a text is truncated (tokens)."})
    block_size: int | None = field(
        default=None, metadata={"help": "Length of the sequences of a causal LM (tokens; if unset, at most 1024)."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many rows for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many rows for the evaluation."})


def load_data(args: DataArguments) -> DatasetDict:
    """Returns the splits `train` and `validation` of the one source that `args` names."""
    if sum(map(bool, (args.dataset_name, args.train_file, args.train_dir))) != 1:
        raise ValueError("name the data with exactly one of --dataset_name, --train_file and --train_dir")
    data = _read_named(args) if args.dataset_name else _read_local(args)
    if "train" not in data:
        raise ValueError(f"{args.dataset_name} has no split 'train' but {', '.join(data)}")

    shuffle = args.task != "causal-lm"  # rows sorted by class have to be mixed, the lines of a text stay together
    if "validation" not in data:
        if not 0 < (share := args.validation_split_percentage / 100) < 1:
            raise ValueError(f"--validation_split_percentage must be 1 to 99, got {args.validation_split_percentage}")
        parts = data["train"].train_test_split(share, shuffle=shuffle, seed=SUBSET_SEED)
        data = {"train": parts["train"], "validation": parts["test"]}
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    return DatasetDict({split: _limit(data[split], limit, split, shuffle) for split, limit in limits.items()})


def _read_named(args: DataArguments) -> DatasetDict:
    if embedded.is_embedded(args.dataset_name):
        return embedded.load_dataset(args.dataset_name)
    return datasets.load_dataset(args.dataset_name, args.dataset_config_name)


def _read_local(args: DataArguments) -> DatasetDict:
    files = {"train": args.train_file, "validation": args.validation_file}
    folders = {"train": args.train_dir, "validation": args.validation_dir}
    paths = {split: path for split, path in (files if args.train_file else folders).items() if path}
    for path in paths.values():
        if not os.path.exists(path):
            raise ValueError(f"there is no {path}")
    if args.train_dir:
        file_format, options = "imagefolder", {}
        paths = {split: os.path.join(path, "**") for split, path in paths.items()}
    else:
        endings = {os.path.splitext(path)[1].lower() for path in paths.values()}
        if len(endings) != 1 or not endings <= set(FILE_FORMATS):
            raise ValueError(f"{' and '.join(paths.values())} should end in one of {', '.join(FILE_FORMATS)}")
        file_format = FILE_FORMATS[endings.pop()]
        options = {"keep_linebreaks": True} if file_format == "text" else {}
    try:
        return datasets.load_dataset(file_format, data_files=paths, **options)
    except (DatasetsError, ValueError) as error:
        raise ValueError(f"could not read {' and '.join(paths.values())}: {error.__cause__ or error}") from error


def _limit(rows: datasets.Dataset, limit: int | None, split: str, shuffle: bool) -> datasets.Dataset:
    if limit is not None and limit < len(rows):
        rows = (rows.shuffle(seed=SUBSET_SEED) if shuffle else rows).select(range(limit))
    if len(rows) == 0:
        raise ValueError(f"the {split} data have no rows")
    return rows


def check_columns(data: DatasetDict, args: DataArguments, *flags: str) -> None:
    """Raises `ValueError` where a column that one of `flags` names is missing, has holes, or is of another type."""
    for (split, rows), flag in product(data.items(), flags):
        name = getattr(args, flag)
        if name not in rows.features:
            raise ValueError(f"the {split} data have no column {name!r} but {', '.join(rows.features)}: set --{flag}")
        if empty := rows.data.column(name).null_count:
            raise ValueError(f"column {name!r} of the {split} data is empty in {empty} rows")
        if not str(getattr(rows.features[name], "dtype", None)).startswith(COLUMN_TYPES[flag]):
            raise ValueError(f"column {name!r} cannot be the --{flag}, it holds {rows.features[name]}")


def read_classes(data: DatasetDict, column: str) -> tuple[list[str], dict[Any, int]]:
    """Returns the names of the classes, and the number that stands for each value of `column`."""
    feature = data["train"].features[column]
    is_numbered = isinstance(feature, datasets.ClassLabel)
    values = range(feature.num_classes) if is_numbered else sorted(data["train"].unique(column))
    names = feature.names if is_numbered else [str(value) for value in values]
    numbers = {value: number for number, value in enumerate(values)}
    if unknown := set(chain(*(rows.unique(column) for rows in data.values()))) - set(numbers):
        raise ValueError(f"label {unknown.pop()!r} in column {column!r} is none of the training classes {names}")
    if len(names) < 2:
        raise ValueError(f"column {column!r} holds one class, {names[0]!r}: there is nothing to tell apart")
    return names, numbers


def train_tokenizer(texts: datasets.Dataset, column: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE of at most `vocab_size` tokens, with one special token for every purpose."""
    bpe = ByteLevelBPETokenizer()
    batches = (batch[column] for batch in texts.iter(1000))
    bpe.train_from_iterator(batches, vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
