"""Trains constrained GRPO on a tiny model and writes what happened; started by the tests in several processes."""

import argparse

import torch

from tests.distributed.train_ppo import finish, train
from tests.helpers.constrained_grpo import BOUNDS
from tests.helpers.constrained_ppo import length, low_ids, prompts
from tests.helpers.tiny import WORDS, tiny_tokenizer
from trl_ext import ConstrainedGRPOConfig, ConstrainedGRPOTrainer


LOGGED = (
    "loss", "grad_norm", "rewards/low_ids/mean", "kl/per_token", "kl/coef", "kl/loss_coef", "weight/low_ids",
    "violation/length", "average/low_ids", "average/kl", "eval_kl/per_response",
)  # fmt: skip


def rollout(batch, trainer):
    """Completions that follow from the step and the place in the rollout of all processes, as sampling would not."""
    start = trainer.accelerator.process_index * len(batch)
    completions = []
    for row in range(start, start + len(batch)):
        generator = torch.Generator().manual_seed(1000 * trainer.state.global_step + row)
        count = int(torch.randint(2, 7, (), generator=generator))
        completions.append(torch.randint(3, len(WORDS), (count,), generator=generator).tolist())
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in batch]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--resume")
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
        rollout_func=rollout,
    )
    finish(trainer, train(trainer, options.resume, LOGGED), options.output)


if __name__ == "__main__":
    main()
