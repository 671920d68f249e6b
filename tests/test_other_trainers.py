"""Trainers that are built on the stock one: by registration and by the mixins, whole models and PEFT adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import model as tiny_bert
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_eva import Eva, EvaTrainerMixin, EvaTrainingArgumentsMixin, register, unregister

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
from transformers import PreTrainedTokenizerFast  # noqa: E402

WORDS = ["film", "lovely", "awful", "is", "the", "actor"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@dataclass
class Kind:
    """A trainer with its arguments, a small model, data, and what else the trainer takes."""

    trainer: type[Trainer]
    arguments: type[TrainingArguments]
    model: torch.nn.Module
    rows: Any
    settings: dict[str, Any]
    others: dict[str, Any]
    task: str
    targets: list[str]


def gpt2(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=16, vocab_size=len(tokenizer), **special)
    GPT2LMHeadModel(config).save_pretrained(tokenizer.folder)  # where DPOTrainer takes its reference model from
    return GPT2LMHeadModel.from_pretrained(tokenizer.folder)


def seq2seq(tokenizer: PreTrainedTokenizerFast) -> Kind:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0))
    rows = [{**tokenizer(f"the film is {word}"), "labels": tokenizer(f"{word} film")["input_ids"]} for word in WORDS]
    settings = {"predict_with_generate": True, "generation_max_length": 4}
    others = {"data_collator": DataCollatorForSeq2Seq(tokenizer, model), "processing_class": tokenizer}
    return Kind(Seq2SeqTrainer, Seq2SeqTrainingArguments, model, rows, settings, others, "SEQ_2_SEQ_LM", ["q", "v"])


def need_trl() -> Any:
    pytest.importorskip("accelerate", minversion="1.10", reason="TRL reads Accelerator.parallelism_config")
    return pytest.importorskip("trl")


def sft(tokenizer: PreTrainedTokenizerFast) -> Kind:
    trl = need_trl()
    rows = datasets.Dataset.from_dict({"text": [f"the {word} is lovely" for word in WORDS] * 2})
    others = {"processing_class": tokenizer}
    return Kind(
        trl.SFTTrainer, trl.SFTConfig, gpt2(tokenizer), rows, {"max_length": 8}, others, "CAUSAL_LM", ["c_attn"]
    )


def dpo(tokenizer: PreTrainedTokenizerFast) -> Kind:
    trl = need_trl()
    columns = {"prompt": "the film is", "chosen": " lovely", "rejected": " awful"}
    rows = datasets.Dataset.from_dict({name: [text] * 8 for name, text in columns.items()})
    others = {"processing_class": tokenizer}
    return Kind(
        trl.DPOTrainer, trl.DPOConfig, gpt2(tokenizer), rows, {"max_length": 8}, others, "CAUSAL_LM", ["c_attn"]
    )


def sentences(tokenizer: PreTrainedTokenizerFast) -> Kind:
    """With a loss that has parameters of its own, which the model does not know."""
    library = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.losses")
    tiny_bert().bert.save_pretrained(tokenizer.folder)
    tokenizer.save_pretrained(tokenizer.folder)
    model = library.SentenceTransformer(str(tokenizer.folder), device="cpu")
    model.max_seq_length = 8
    pairs = {
        "anchor": [f"the film is {word}" for word in WORDS],
        "positive": [f"the actor is {word}" for word in WORDS],
    }
    rows = datasets.Dataset.from_dict({**pairs, "label": [0, 1] * 3})
    loss = losses.SoftmaxLoss(model, sentence_embedding_dimension=32, num_labels=2)
    return Kind(
        library.SentenceTransformerTrainer,
        library.SentenceTransformerTrainingArguments,
        model,
        rows,
        {},
        {"loss": loss},
        "FEATURE_EXTRACTION",
        ["query"],
    )


KINDS: dict[str, Callable[[PreTrainedTokenizerFast], Kind]] = {
    "Seq2SeqTrainer": seq2seq,
    "SFTTrainer": sft,
    "DPOTrainer": dpo,
    "SentenceTransformerTrainer": sentences,
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Kind:
    tokenizer.folder = tmp_path / "model"
    return KINDS[request.param](tokenizer)


@pytest.fixture
def registered() -> Iterator[None]:
    register()
    yield
    unregister()


def settings(kind: Kind, folder: Path) -> dict[str, Any]:
    training = {"max_steps": 12, "logging_steps": 1, "learning_rate": 3e-3, "per_device_train_batch_size": 4}
    rest = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return {**training, **rest, **kind.settings}


def train(cls: type[Trainer], args: TrainingArguments, kind: Kind) -> Trainer:
    """Trains, and checks that Eva did it, that the loss fell, and that all trainable parameters moved and no other."""
    trainer = cls(model=kind.model, args=args, train_dataset=kind.rows, eval_dataset=kind.rows, **kind.others)
    # The loss of a SentenceTransformer holds the model, and may hold parameters of its own.
    parameters = dict(getattr(trainer, "loss", trainer.model).named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, Eva)
    moved = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    used = {name for name in parameters if "pooler" not in name}  # sentences are the means of their tokens
    assert moved == {name for name in used if parameters[name].requires_grad}
    assert trainer.evaluate()["eval_loss"] < loss
    return trainer


@pytest.mark.parametrize("variant", ["eva_s", "eva"])
def test_registered(kind, variant, registered, tmp_path):
    args = kind.arguments(**settings(kind, tmp_path), optim="eva", optim_args=f"variant={variant}")
    assert train(kind.trainer, args, kind).optimizer.optimizer.config.variant == variant


def mixed(kind: Kind) -> tuple[type[Trainer], type[TrainingArguments]]:
    @dataclass
    class Arguments(EvaTrainingArgumentsMixin, kind.arguments):
        pass

    class WithEva(EvaTrainerMixin, kind.trainer):
        pass

    return WithEva, Arguments


def test_by_the_mixins(kind, tmp_path):
    cls, arguments = mixed(kind)
    defaults = arguments(str(tmp_path), use_cpu=True, bf16=False)
    assert defaults.optim == "eva"
    assert defaults.learning_rate == kind.arguments(str(tmp_path), use_cpu=True, bf16=False).learning_rate
    trainer = train(cls, arguments(**settings(kind, tmp_path), eva_rank=2), kind)
    assert trainer.optimizer.optimizer.config.rank == 2
    assert any("optimizer_share" in log for log in trainer.state.log_history)
    trainer.create_model_card()
    assert "### Training time" in (tmp_path / "README.md").read_text()


def test_the_mixins_leave_other_optimizers_alone(kind, tmp_path):
    cls, arguments = mixed(kind)
    args = arguments(**{**settings(kind, tmp_path), "max_steps": 1}, optim="adamw_torch")
    trainer = cls(model=kind.model, args=args, train_dataset=kind.rows, **kind.others)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)


@pytest.mark.parametrize("variant", ["eva_s", "eva"])
def test_adapters(kind, variant, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        task_type=kind.task, r=2, target_modules=kind.targets, fan_in_fan_out="c_attn" in kind.targets
    )
    if kind.task == "FEATURE_EXTRACTION":
        # what the model's `add_adapter` calls, which refuses a PEFT older than one that may not be released yet
        peft.inject_adapter_in_model(lora, kind.model.transformers_model)
    else:
        kind.model = peft.get_peft_model(kind.model, lora)
    cls, arguments = mixed(kind)
    trainer = train(cls, arguments(**settings(kind, tmp_path), eva_variant=variant), kind)
    names = {layer.name for layer in trainer.optimizer.optimizer.layers}
    assert names and all("lora_" in name for name in names)
