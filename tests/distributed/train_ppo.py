"""Trains constrained PPO on a tiny model and writes what happened; started by the tests in several processes."""

import argparse
import json
import os
import sys
from pathlib import Path

from accelerate.utils import gather_object

from tests.helpers.constrained_ppo import low_ids, prompts
from tests.helpers.launched import shard_fully, wrapper_chain
from tests.helpers.tiny import tiny_tokenizer
from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer


LOGGED = (
    "loss", "grad_norm", "rewards/low_ids/mean", "kl/per_token", "kl/coef", "critic/kl/loss", "critic/length/value",
    "weight/low_ids", "violation/length", "average/low_ids", "eval_gold", "eval_kl/per_response",
)  # fmt: skip


def length(completion_ids, **columns):
    """Each token earns an eighth."""
    return [[1 / 8] * len(ids) for ids in completion_ids]


class RaisesLater:
    """A reward that does not last."""

    def __init__(self, reward):
        self.reward, self.calls, self.__name__ = reward, 0, reward.__name__

    def __call__(self, **columns):
        self.calls += 1
        if self.calls > 2:
            raise ZeroDivisionError("the reward of this rank")
        return self.reward(**columns)


def make_trainer(options: argparse.Namespace, output: str, **settings) -> ConstrainedPPOTrainer:
    arguments = ConstrainedPPOConfig(
        output_dir=output,
        method="xi",
        constraints=[{"reward": "low_ids", "threshold": 0.7}, {"reward": "length", "threshold": 0.5}],
        token_rewards=["length"],
        critic_warmup_steps=1,
        calibration_samples=8,
        kl_target=0.01,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        max_completion_length=6,
        generation_kwargs={"do_sample": False},
        learning_rate=2e-3,
        critic_learning_rate=1e-2,
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
        **settings,
    )
    return ConstrainedPPOTrainer(
        options.model,
        reward_funcs=[low_ids, length],
        args=arguments,
        train_dataset=prompts(),
        eval_dataset=prompts(8),
        processing_class=tiny_tokenizer(),
        gold_reward=low_ids,
    )


def train(
    trainer: ConstrainedPPOTrainer,
    resume: str | None = None,
    logged: tuple[str, ...] = LOGGED,
    fully_shard: bool = False,
) -> dict:
    """Trains, saves to the folder `final`, and gives what happened; with `fully_shard`, sharded and without saving."""
    if fully_shard:
        shard_fully(trainer)
        trainer.args.save_strategy = "no"  # accelerate gathers what is saved, where it has sharded it
    trainer.train(resume_from_checkpoint=resume)
    if not fully_shard:
        trainer.save_model(str(Path(trainer.args.output_dir) / "final"))
    history = trainer.state.log_history
    return {
        "world_size": trainer.args.world_size,
        "chain": wrapper_chain(trainer),
        "multipliers": gather_object([trainer.multipliers.state_dict()]),
        "states": gather_object([trainer.controller.state_dict()]),
        **{key: [entry[key] for entry in history if key in entry] for key in logged},
    }


def finish(trainer: ConstrainedPPOTrainer, found: dict, output: str) -> None:
    """Writes what happened and ends the process."""
    if trainer.is_world_process_zero():
        (Path(output) / "found.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    # Everything is written; taking the trainer down can wait for ever for a gloo peer that is already gone
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--critic", default="shared")
    parser.add_argument("--resume")
    parser.add_argument("--fully_shard", action="store_true")
    parser.add_argument("--reward_raises_on", type=int, help="rank on which the third call of a reward raises")
    options = parser.parse_args()
    trainer = make_trainer(options, options.output, critic=options.critic)
    if options.reward_raises_on == trainer.accelerator.process_index:
        trainer.reward_funcs[0] = RaisesLater(trainer.reward_funcs[0])
    finish(trainer, train(trainer, options.resume, fully_shard=options.fully_shard), options.output)


if __name__ == "__main__":
    main()
