# /// script
# dependencies = ["hf-eva[embedded]"]
# ///
r"""
Fine-tune a model, or train one from scratch, with Eva: sequence classification, causal language modelling or image
classification. A recipe is a YAML file of the arguments below; the command line overrides it.

    accelerate launch scripts/finetune.py configs/recipes/bert.yaml
    accelerate launch scripts/finetune.py configs/recipes/bert.yaml --optim adamw_torch --output_dir runs/bert-adamw
    accelerate launch scripts/finetune.py configs/recipes/bert.yaml --baseline_run runs/bert-adamw
    accelerate launch --config_file configs/accelerate/cpu_2.yaml scripts/finetune.py configs/recipes/gpt2.yaml
    torchrun --nproc_per_node 2 scripts/finetune.py configs/recipes/vit.yaml --resume_from_checkpoint last

Without a recipe, here from the Hub:

    python scripts/finetune.py --task sequence-classification --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --text_column sentence --output_dir runs/sst2
"""

import os
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from itertools import chain
from typing import Any

import datasets
import embedded
import evaluate
import numpy as np
import transformers
from datasets import DatasetDict
from recipe import near_miss, parse_arguments
from task_data import DataArguments, check_columns, load_data, read_classes, train_tokenizer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    default_data_collator,
)

from hf_eva import EvaTrainer, EvaTrainingArguments, plan
from hf_eva.checkpoints import last_checkpoint

# The one without torchvision has a name of its own in newer releases of transformers.
IMAGE_PROCESSOR = "ViTImageProcessorPil" if hasattr(transformers, "ViTImageProcessorPil") else "ViTImageProcessor"
METRICS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "metrics")
BAD_INPUT = (ValueError, OSError, ImportError, RuntimeError, datasets.exceptions.DatasetsError)
HUB_TASKS = {"sequence-classification": "text-classification", "causal-lm": "text-generation"}  # named otherwise there
Setup = tuple[DatasetDict, dict[str, Any]]  # the data, and the other arguments of the Trainer with a `model_init`
SUMMARY = {
    "train_loss": "training loss, mean of the run",
    "eval_loss": "evaluation loss",
    "eval_accuracy": "evaluation accuracy",
    "eval_majority_class": "accuracy of naming the majority class",
    "eval_f1": "evaluation F1",
    "perplexity": "evaluation perplexity",
    "train_steps_seconds": "seconds in training steps",
    "train_total_seconds": "seconds of the training in all",
    "script_seconds": "seconds with loading and preparation",
}


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to fine-tune: a Hub name, a folder, or `embedded:minilm`."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Train a model of this type (`gpt2`, `vit`, …) from scratch instead."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the configuration of that type, as in `n_layer=4,n_embd=128`."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, where it is not the model's: as for `model_name_or_path`."}
    )
    vocab_size: int = field(
        default=4096,
        metadata={"help": "Size of the byte-level BPE trained for a causal LM from scratch without a tokenizer."},
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write into a folder that is not empty."})


def find_checkpoint(args: EvaTrainingArguments, overwrite: bool) -> str | None:
    """Returns the checkpoint to resume from, if any; refuses to start anew in a folder that holds something."""
    folder, wanted = args.output_dir, args.resume_from_checkpoint
    if wanted is None:
        if os.path.isdir(folder) and os.listdir(folder) and not overwrite:
            raise ValueError(
                f"{folder} is not empty: continue its run with --resume_from_checkpoint last, choose another "
                "--output_dir, or write into it with --overwrite_output_dir true"
            )
        return None
    is_last = wanted.lower() in ("last", "true")
    checkpoint = last_checkpoint(folder) if is_last else wanted
    if checkpoint is None or not os.path.isfile(os.path.join(checkpoint, "trainer_state.json")):
        raise ValueError(f"there is no checkpoint to resume from in {folder if is_last else wanted}")
    return checkpoint


def from_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(embedded.model_path(name) if embedded.is_embedded(name) else name, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(":")  # the lines below it give general advice
        raise ValueError(f"{auto_class.__name__} could not load {name!r}: {reason}") from error


def read_config(args: ModelArguments, **options: Any) -> transformers.PreTrainedConfig:
    if args.model_type is None:
        return from_pretrained(AutoConfig, args.model_name_or_path, **options)
    known = list(transformers.CONFIG_MAPPING)
    if args.model_type not in known:
        raise ValueError(f"unknown --model_type {args.model_type!r}{near_miss(args.model_type, known)}")
    config = AutoConfig.for_model(args.model_type, **options)
    if args.config_overrides:
        try:
            config.update_from_string(args.config_overrides)
        except (ValueError, TypeError) as error:
            raise ValueError(f"--config_overrides do not fit a {args.model_type}: {error}") from error
    return config


def make_model(auto_class: Any, args: ModelArguments, config: Any) -> transformers.PreTrainedModel:
    if args.model_type is None:
        return from_pretrained(auto_class, args.model_name_or_path, config=config)
    return auto_class.from_config(config)


def sequence_length(flag: str, asked: int | None, config: transformers.PreTrainedConfig) -> int:
    limit = getattr(config, "max_position_embeddings", None) or 1024
    if asked is not None and asked > limit:
        raise ValueError(f"--{flag} {asked} is more than the {limit} positions of the model")
    return asked or min(limit, 1024)


def classification_metrics(names: list[str]) -> Callable[[transformers.EvalPrediction], dict[str, float]]:
    accuracy, f1 = (evaluate.load(os.path.join(METRICS, name), keep_in_memory=True) for name in ("accuracy", "f1"))

    def compute(evaluated: transformers.EvalPrediction) -> dict[str, float]:
        logits = evaluated.predictions[0] if isinstance(evaluated.predictions, tuple) else evaluated.predictions
        answers = {"predictions": logits.argmax(-1), "references": evaluated.label_ids}
        score = f1.compute(**answers, average="binary" if len(names) == 2 else "macro")
        majority = np.bincount(evaluated.label_ids).max() / len(evaluated.label_ids)
        return {**accuracy.compute(**answers), **score, "majority_class": float(majority)}

    return compute


def class_options(names: list[str]) -> dict[str, dict]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def sequence_classification(model_args: ModelArguments, args: DataArguments, data: DatasetDict) -> Setup:
    check_columns(data, args, "text_column", "label_column")
    names, numbers = read_classes(data, args.label_column)
    if not (tokenizer_name := model_args.tokenizer_name or model_args.model_name_or_path):
        raise ValueError("a text classifier from scratch needs a --tokenizer_name")
    tokenizer = from_pretrained(AutoTokenizer, tokenizer_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # GPT-2 has none
    options = {"vocab_size": len(tokenizer)} if model_args.model_type else {}
    config = read_config(model_args, **class_options(names), **options)
    config.pad_token_id = tokenizer.pad_token_id
    length = sequence_length("max_seq_length", args.max_seq_length, config)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        labels = [numbers[label] for label in rows[args.label_column]]
        return {**tokenizer(rows[args.text_column], truncation=True, max_length=length), "labels": labels}

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
    return data, {
        "model_init": partial(make_model, AutoModelForSequenceClassification, model_args, config),
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": classification_metrics(names),
    }


def causal_lm(model_args: ModelArguments, args: DataArguments, data: DatasetDict) -> Setup:
    check_columns(data, args, "text_column")
    if tokenizer_name := model_args.tokenizer_name or model_args.model_name_or_path:
        tokenizer = from_pretrained(AutoTokenizer, tokenizer_name)
    else:
        tokenizer = train_tokenizer(data["train"], args.text_column, model_args.vocab_size)
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    options = {"vocab_size": len(tokenizer), **special} if model_args.model_type else {}
    config = read_config(model_args, **options)
    size = sequence_length("block_size", args.block_size, config)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        tokens = list(chain(*tokenizer(rows[args.text_column], verbose=False)["input_ids"]))
        blocks = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
        return {"input_ids": blocks, "labels": blocks}

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
    for split, rows in data.items():
        if len(rows) == 0:
            raise ValueError(f"the {split} text is shorter than one block of {size} tokens: lower --block_size")
    model_init = partial(make_model, AutoModelForCausalLM, model_args, config)
    return data, {"model_init": model_init, "processing_class": tokenizer, "data_collator": default_data_collator}


def image_classification(model_args: ModelArguments, args: DataArguments, data: DatasetDict) -> Setup:
    check_columns(data, args, "image_column", "label_column")
    names, numbers = read_classes(data, args.label_column)
    config = read_config(model_args, **class_options(names))
    if model_args.model_type:
        side = getattr(config, "image_size", 224)
        size = {"height": side, "width": side}
        processor = getattr(transformers, IMAGE_PROCESSOR)(size=size)  # resizes, and scales to -1..1
    else:
        processor = from_pretrained(AutoImageProcessor, model_args.model_name_or_path)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        images = [image.convert("RGB") for image in rows[args.image_column]]
        labels = [numbers[label] for label in rows[args.label_column]]
        return {"pixel_values": list(processor(images, return_tensors="np")["pixel_values"]), "labels": labels}

    data = data.with_transform(encode)
    return data, {
        "model_init": partial(make_model, AutoModelForImageClassification, model_args, config),
        "processing_class": processor,
        "data_collator": default_data_collator,
        "compute_metrics": classification_metrics(names),
    }


TASKS = {
    "sequence-classification": sequence_classification,
    "causal-lm": causal_lm,
    "image-classification": image_classification,
}


def set_up(model_args: ModelArguments, data_args: DataArguments) -> Setup:
    """Returns the data as the model reads it, and how to make that model; raises one of `BAD_INPUT`."""
    if bool(model_args.model_name_or_path) == bool(model_args.model_type):
        raise ValueError("name the model with either --model_name_or_path or --model_type")
    if model_args.config_overrides and not model_args.model_type:
        raise ValueError("--config_overrides change a new model, so they need a --model_type")
    return TASKS[data_args.task](model_args, data_args, load_data(data_args))


def prepare(argv: list[str]) -> tuple[EvaTrainer, str | None]:
    """Returns trainer and checkpoint, or raises one of `BAD_INPUT` and leaves nothing behind."""
    model_args, data_args, args = parse_arguments((ModelArguments, DataArguments, EvaTrainingArguments), argv, __doc__)
    checkpoint = find_checkpoint(args, model_args.overwrite_output_dir)
    if args.process_index > 0:
        datasets.disable_progress_bars()
    with args.main_process_first(desc="preparing the data"):
        data, setup = set_up(model_args, data_args)
    transformers.set_seed(args.seed)  # a new head, or a whole new model, is drawn before there is a Trainer
    model = setup.pop("model_init")()
    if checkpoint and glob(os.path.join(checkpoint, "model.safetensors*")):
        # The Trainer overlooks weights that are saved under their older names, as those of a ViT are.
        # Copied, because sums depend on how a file's tensors lie in memory, and the last bit of the run on sums.
        model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict())
    # The model knows no column by the name of the images, and the Trainer would drop it.
    args.remove_unused_columns &= data_args.task != "image-classification"
    if args.optim == "eva":
        table = plan(model, args.optim_target_modules, args.eva_exclude, args.eva_config)
        if args.process_index == 0:
            print(table)
    trainer = EvaTrainer(model, args, train_dataset=data["train"], eval_dataset=data["validation"], **setup)
    trainer.card_defaults = {
        "dataset": data_args.dataset_name
        or os.path.basename(os.path.normpath(data_args.train_file or data_args.train_dir)),
        "finetuned_from": embedded.hub_id(model_args.model_name_or_path),
        "tasks": HUB_TASKS.get(data_args.task, data_args.task),
    }
    if data_args.dataset_name and not embedded.is_embedded(data_args.dataset_name):
        trainer.card_defaults |= {
            "dataset_tags": data_args.dataset_name,
            "dataset_args": data_args.dataset_config_name,
        }
    return trainer, checkpoint


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    try:
        trainer, checkpoint = prepare(sys.argv[1:] if argv is None else argv)
    except BAD_INPUT as error:
        print(f"finetune.py: error: {textwrap.shorten(str(error), 1000)}", file=sys.stderr)
        sys.exit(2)

    training = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    evaluation = trainer.evaluate()
    if trainer.compute_metrics is None:
        evaluation["perplexity"] = float(np.exp(evaluation["eval_loss"]))
    training["script_seconds"] = time.perf_counter() - started
    trainer.save_metrics("train", training)
    trainer.save_metrics("eval", evaluation)
    trainer.save_state()

    trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        folder = trainer.args.output_dir
        results = {**training, **evaluation}
        rows = [f"{label:<38}{results[key]:>12,.4g}" for key, label in SUMMARY.items() if key in results]
        print("", *rows, f"plot  {folder}/loss.png", f"card  {folder}/README.md", sep="\n")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
