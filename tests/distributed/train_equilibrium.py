"""Trains a reward model with an equilibrium head and writes what happened; started by the tests."""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from tests.helpers.launched import finish, shard_fully
from tests.helpers.tiny import tiny_pairs, tiny_tokenizer
from trl_ext import EPModelForSequenceClassification, EPRewardConfig, EPRewardTrainer


COMMON = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}


def make_trainer(options, folder: Path, seed: int, peft_config=None, **settings) -> EPRewardTrainer:
    arguments = EPRewardConfig(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        homeostasis_coef=10.0,
        **{"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": False},
        **COMMON,
        **{"max_steps": 4, **settings},
    )
    set_seed(seed)
    model = EPModelForSequenceClassification.from_pretrained(
        options.model, num_labels=1, hidden_features=[8, 8], feedback="asymmetric", feedback_angle=60.0,
        spectral_cap=0.6, tolerance=1e-6, input_norm="standardize",
    )  # fmt: skip
    return EPRewardTrainer(
        model, arguments, train_dataset=tiny_pairs(16), processing_class=tiny_tokenizer(), peft_config=peft_config
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def use_as_reward(options, path: Path) -> dict:
    """Mean rewards that two steps of GRPO log."""
    trainer = GRPOTrainer(
        options.model,
        [str(path)],
        GRPOConfig(
            output_dir=str(path.parent / "grpo"), per_device_train_batch_size=2, num_generations=2, max_steps=2,
            max_completion_length=4, gradient_checkpointing=False, save_strategy="no", **COMMON,
        ),
        tiny_pairs(8).select_columns("prompt"),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    return {
        "reward_model": type(trainer.accelerator.unwrap_model(trainer.reward_funcs[0])).__name__,
        "rewards": [entry["rewards/final/mean"] for entry in trainer.state.log_history if "loss" in entry],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--max_steps", type=int, default=4)
    parser.add_argument("--resume")
    parser.add_argument("--fully_shard", action="store_true")
    parser.add_argument("--everything", action="store_true", help="also resume, adapters, and the reward in GRPO")
    options = parser.parse_args()
    trainer = make_trainer(options, options.output, seed=0, max_steps=options.max_steps)
    if options.fully_shard:
        shard_fully(trainer)
        trainer.args.save_strategy = "no"  # accelerate gathers what is saved, where it has sharded it
    trainer.train(resume_from_checkpoint=options.resume)
    found = {
        "losses": losses(trainer),
        "angles": [entry["ep/weight_angle"] for entry in trainer.state.log_history if "loss" in entry],
    }
    if options.fully_shard:
        finish(trainer, options.output, found)
    trainer.save_model(str(options.output / "final"))
    tiny_tokenizer().save_pretrained(options.output / "final")
    if options.everything:
        resumed = make_trainer(options, options.output / "resumed", seed=5)
        resumed.train(resume_from_checkpoint=str(options.output / "checkpoint-2"))
        found["resumed"] = losses(resumed)
        resumed.save_model(str(options.output / "resumed" / "final"))
        lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
        adapted = make_trainer(options, options.output / "lora", seed=0, peft_config=lora, save_only_model=True)
        adapted.train()
        adapted.save_model(str(options.output / "lora"))
        found["lora"] = losses(adapted)
        found |= use_as_reward(options, options.output / "final")
    finish(trainer, options.output, found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
