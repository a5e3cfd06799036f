"""Trains a tiny Qwen3 with AdamP in transformers' Trainer; started by the tests in one or several processes."""

import argparse
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from tests.helpers.launched import finish
from tests.helpers.tiny import WORDS, tiny_model
from trl_ext.optim import AdamP
from trl_ext.optim.callbacks import bottom_optimizer


def examples(num_examples):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, len(WORDS), (num_examples, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    options = parser.parse_args()
    trainer = Trainer(
        tiny_model("qwen3"),
        args=TrainingArguments(
            output_dir=options.output, per_device_train_batch_size=options.batch_size, max_steps=8, use_cpu=True,
            bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
            max_grad_norm=1.0, train_sampling_strategy="sequential",
        ),
        train_dataset=examples(32),
        optimizer_cls_and_kwargs=(AdamP, {"lr": 5e-3, "weight_decay": 0.1}),
    )  # fmt: skip
    trainer.train()
    report = bottom_optimizer(trainer.optimizer).report()
    trainer.save_model(str(Path(options.output) / "model"))
    # The first group's parameters are the decayed ones: embedding, then q, k, v, o, gate, up, down of each layer
    layer_share = {
        name: min(report[f"0.{first}"]["layer"], report[f"0.{first + 7}"]["layer"])
        for name, first in (("q_proj", 1), ("k_proj", 2))
    }
    finish(trainer, options.output, {"layer_share": layer_share})


if __name__ == "__main__":
    main()
