"""Trains constrained GRPO on a tiny model and writes what happened; started by the tests in several processes."""

import argparse

from tests.distributed.train_ppo import finish, train
from tests.helpers.constrained_grpo import BOUNDS
from tests.helpers.constrained_ppo import fixed_completions, length, low_ids, prompts
from tests.helpers.tiny import tiny_tokenizer
from trl_ext import ConstrainedGRPOConfig, ConstrainedGRPOTrainer


LOGGED = (
    "loss", "grad_norm", "rewards/low_ids/mean", "kl/per_token", "kl/coef", "kl/loss_coef", "weight/low_ids",
    "violation/length", "average/low_ids", "average/kl", "eval_kl/per_response",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--resume")
    parser.add_argument("--fully_shard", action="store_true")
    options = parser.parse_args()
    trainer = ConstrainedGRPOTrainer(
        options.model,
        reward_funcs=[low_ids, length],
        args=ConstrainedGRPOConfig(
            output_dir=options.output,
            **BOUNDS,
            # A rollout holds one prompt, whose completions lie on both processes
            num_generations=8,
            group_baseline="leave_one_out",
            missing_eos_penalty=0.3,
            calibration_samples=8,
            beta=0.1,
            kl_target=1e-4,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            max_completion_length=6,
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            max_steps=4,
            num_iterations=2,
            logging_steps=1,
            save_strategy="steps",
            save_steps=3,
            eval_strategy="steps",
            eval_steps=4,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=prompts(),
        eval_dataset=prompts(8),
        processing_class=tiny_tokenizer(),
        rollout_func=fixed_completions,
    )
    finish(trainer, train(trainer, options.resume, LOGGED, options.fully_shard), options.output)


if __name__ == "__main__":
    main()
