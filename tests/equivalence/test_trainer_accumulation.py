"""In a Trainer: per_device_train_batch_size × gradient_accumulation_steps, and nothing else, decides a step."""

import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from harness import HOOKED, Run, assert_same
from zoo import VOCABULARY, ZOO, sentences

from hf_eva import EvaTrainer, EvaTrainingArguments
from hf_eva.loss_scale import ignores_item_count, warn_of_loss_scale

# Of 22 sentences the last window has six: with micro-batches of four they are four and two.
TEXTS = [*sentences(11, seed=0), *sentences(11, seed=1)]
WAYS = [(8, 2), (4, 4), (1, 16)]


def run(tmp_path, model, collate, batch, accumulated, cls=EvaTrainer, texts=TEXTS, optim="eva", **changes) -> Run:
    """One epoch of two steps. (Losses of language models are computed in single precision, whatever the model is.)"""
    options = changes.pop("options", {})
    args = EvaTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        adam_epsilon=1e-3,  # so that entries without a gradient do not go where rounding sends them
        optim=optim,
        **({"eva_variant": "eva", "eva_damping": HOOKED["eva"].damping} if optim == "eva" else {}),
        **changes,
    )
    trainer = cls(model.double(), args, train_dataset=texts, data_collator=collate, **options)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    found = Run(*([torch.tensor(log[key]) for log in logs] for key in ("loss", "grad_norm")))
    return found.end(model, trainer.optimizer.optimizer)


def assert_ways_agree(train, ways=((4, 4),)):
    expected = train(16, 1)
    for way in ways:
        assert_same(train(*way), expected, 5e-5)  # Trainer adds losses up in float32


def double(batch):
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def collate_for(animal):
    return lambda texts: double(animal.batch(texts))


@pytest.mark.parametrize("name", ZOO)
def test_micro_batches_are_one_batch(tmp_path, name):
    assert_ways_agree(lambda *way: run(tmp_path, ZOO[name].build(), collate_for(ZOO[name]), *way), WAYS)


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_so_they_are_for_adamw(tmp_path, name):
    assert_ways_agree(lambda *way: run(tmp_path, ZOO[name].build(), collate_for(ZOO[name]), *way, optim="adamw_torch"))


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_so_they_are_with_label_smoothing(tmp_path, name):
    animal = ZOO[name]
    assert_ways_agree(
        lambda *way: run(tmp_path, animal.build(), collate_for(animal), *way, label_smoothing_factor=0.2)
    )


@pytest.mark.parametrize("average", [True, False])
def test_so_they_are_whatever_is_averaged_over_devices(tmp_path, average):
    animal = ZOO["llama"]
    assert_ways_agree(
        lambda *way: run(tmp_path, animal.build(), collate_for(animal), *way, average_tokens_across_devices=average)
    )


# Other losses --------------------------------------------------------------------------------------------------------


def masked_words(texts):
    """Only words of one half are to be guessed, so that some micro-batches have none."""
    batch = ZOO["bert"].batch(texts)
    return {**batch, "labels": batch["input_ids"].where(batch["input_ids"] > VOCABULARY * 0.9, -100)}


def numbers(texts):
    return {**ZOO["bert"].batch(texts), "labels": torch.tensor([sum(text) / 50 for text in texts]).double()}


def whole_numbers(texts):
    """As in data whose targets happen to be integers, which a model with one output takes for a regression too."""
    return {**images(texts), "labels": torch.tensor([len(text) for text in texts]).double()}


def several_classes(texts):
    batch = images(texts)
    return {**batch, "labels": F.one_hot(batch["labels"], 3).double()}


def images(texts):
    return double(ZOO["vit"].batch(texts))


def spans(texts):
    """Padded to one length, because an answer may lie in the padding as far as BERT's softmax is concerned."""
    batch = ZOO["bert"].batch(texts, 10)
    del batch["labels"]
    positions = torch.tensor([len(text) // 2 for text in texts])
    return {**batch, "start_positions": positions - 1, "end_positions": positions}


def bert_for(head, **changes):
    config = ZOO["bert"].build().config
    config.update(changes)
    torch.manual_seed(0)
    return getattr(transformers, f"BertFor{head}")(config)


def vit_for(**changes):
    config = ZOO["vit"].build().config
    config.update(changes)
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config)


OTHER_LOSSES = {
    "masked words": (partial(bert_for, "MaskedLM"), masked_words),
    "regression": (partial(bert_for, "SequenceClassification", num_labels=1), numbers),
    "regression of images": (partial(vit_for, num_labels=1), whole_numbers),
    "several classes": (partial(vit_for, problem_type="multi_label_classification"), several_classes),
    "questions": (partial(bert_for, "QuestionAnswering", num_labels=2), spans),
}


@pytest.mark.parametrize(("build", "collate"), OTHER_LOSSES.values(), ids=OTHER_LOSSES)
def test_every_loss_is_a_mean_over_the_whole_batch(tmp_path, build, collate):
    assert_ways_agree(lambda *way: run(tmp_path, build(), collate, *way))


def test_some_micro_batches_had_nothing_to_guess():
    assert any(masked_words([text])["labels"].eq(-100).all() for text in TEXTS)


def focal(outputs, labels, num_items_in_batch=None):
    """A loss of the user's, which divides by the number it is given."""
    each = F.cross_entropy(outputs.logits, labels, reduction="none")
    return ((1 - (-each).exp()) * each).sum() / num_items_in_batch


class OwnLoss(EvaTrainer):
    """A loss of the user's that is a mean, for batches of one size."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=0.1)
        return (loss, outputs) if return_outputs else loss


class Penalty(EvaTrainer):
    """A loss of the user's that builds on the model's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        return (2 * loss, outputs) if return_outputs else 2 * loss


@pytest.mark.parametrize("name", ["bert", "vit"])
@pytest.mark.parametrize("custom", ["function", "own loss", "penalty"])
def test_a_custom_loss(tmp_path, name, custom):
    animal = ZOO[name]
    changes = {
        "function": {"options": {"compute_loss_func": focal}},
        "own loss": {"cls": OwnLoss, "texts": [*TEXTS, *TEXTS][:32]},
        "penalty": {"cls": Penalty},
    }[custom]
    assert_ways_agree(lambda *way: run(tmp_path, animal.build(), collate_for(animal), *way, **changes))


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_evaluation_is_not_weighted(tmp_path, name):
    losses = []
    for batch in (22, 11):
        args = EvaTrainingArguments(str(tmp_path), use_cpu=True, per_device_eval_batch_size=batch, report_to="none")
        args.remove_unused_columns = False
        trainer = EvaTrainer(ZOO[name].build(), args, data_collator=ZOO[name].batch)
        losses.append(trainer.evaluate(sentences(22))["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05 if name == "llama" else 1e-5)  # of means over batches


# Which models divide -------------------------------------------------------------------------------------------------


DIVIDE = {"gpt2", "vit", "opt", "llama", "qwen2", "mixtral"}


@pytest.mark.parametrize("name", ZOO)
def test_models_that_divide_are_told_from_those_that_do_not(name):
    """By what they answer, with and without the number."""
    model, batch = ZOO[name].build(), ZOO[name].batch(sentences())
    ten, twenty = (model(**batch, num_items_in_batch=number).loss for number in (10, 20)) if name != "clip" else (1, 1)
    assert (ten == twenty) == ignores_item_count(model) == (name not in DIVIDE)


@pytest.mark.parametrize(
    ("name", "micro_batches", "processes", "factor"),
    [("bert", 4, 2, 8), ("bert", 1, 1, None), ("t5", 2, 1, 2), ("llama", 4, 2, None), ("vit", 4, 1, None)],
)
def test_the_stock_trainer_is_warned_of(name, micro_batches, processes, factor, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_eva"):
        warn_of_loss_scale(ZOO[name].build(), micro_batches, processes)
    assert (f"{factor} times too large" in caplog.text) == (factor is not None)
    assert len(caplog.records) == (factor is not None)
