"""Searches thresholds on a tiny model and writes what happened; started by the tests in several processes."""

import argparse
from pathlib import Path

from accelerate.utils import gather_object

from tests.helpers.constrained_ppo import length, low_ids, prompts
from tests.helpers.launched import finish
from tests.helpers.tiny import tiny_tokenizer
from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer


def gold(completion_ids, **columns):
    return [1 - (share - 0.5) ** 2 for share in low_ids(completion_ids)]


def make(options, max_steps):
    return ConstrainedPPOTrainer(
        options.model,
        reward_funcs=[low_ids, length],
        args=ConstrainedPPOConfig(
            output_dir=options.output,
            method="xi",
            constraints=[{"reward": "length", "threshold": 0.5}, {"reward": "low_ids", "threshold": 0.7}],
            search={"max_gold_evaluations": 6, "steps_per_threshold": 2, "rollout_window": 1},
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            max_completion_length=6,
            learning_rate=1e-3,
            critic_learning_rate=1e-2,
            max_steps=max_steps,
            logging_steps=1,
            save_strategy="steps",
            save_steps=1,
            calibration_samples=0,
            dashboard=False,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=prompts(),
        eval_dataset=prompts(16),
        gold_reward=gold,
        processing_class=tiny_tokenizer(),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    trainer = make(options, 6)
    trainer.train()
    trainer.save_model(str(Path(options.output) / "final"))
    searches = gather_object([trainer.search_callback.search.state_dict()])
    multipliers = gather_object([trainer.multipliers.state_dict()])
    found = {
        "searches": searches,
        "multipliers": multipliers,
        "best_model_checkpoint": trainer.state.best_model_checkpoint,
    }
    finish(trainer, options.output, found)


if __name__ == "__main__":
    main()
