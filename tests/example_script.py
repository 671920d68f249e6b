"""A training script with the structure of the examples of transformers, for the tests of what runs such scripts."""

import json
import sys
from dataclasses import dataclass, field

import torch
from tiny_training import data, model
from transformers import HfArgumentParser, Trainer, TrainingArguments


@dataclass
class DataArguments:
    num_samples: int = field(default=16, metadata={"help": "Sequences to train on."})
    dropout: float = field(default=0.1, metadata={"help": "Of the whole model."})


class CountingTrainer(Trainer):
    """A subclass of its own, as those for question answering are."""

    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "eval_samples": len(self.eval_dataset)}


def main() -> None:
    parser = HfArgumentParser((DataArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        data_args, args = parser.parse_json_file(sys.argv[1])
    else:
        data_args, args = parser.parse_args_into_dataclasses()
    rows, network = data(data_args.num_samples), model()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = data_args.dropout
    trainer = CountingTrainer(network, args, train_dataset=rows, eval_dataset=rows)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        optimizer = trainer.optimizer.optimizer
        facts = {"argv": sys.argv, "optim": args.optim, "optimizer": type(optimizer).__name__}
        print(json.dumps({**facts, "rank": optimizer.config.rank, "world": args.world_size, **metrics}))


if __name__ == "__main__":
    main()
