"""Trainers without a critic on tiny models, for their tests."""

from tests.helpers.constrained_ppo import length, low_ids, prompts
from tests.helpers.tiny import tiny_tokenizer
from trl_ext import ConstrainedGRPOConfig, ConstrainedGRPOTrainer


# Mixed kinds: a share held from below, a length from above
BOUNDS = {
    "constraints": [
        {"reward": "low_ids", "threshold": 0.7, "kind": ">="},
        {"reward": "length", "threshold": 0.5, "kind": "<="},
    ]
}


def make(
    folder, path, *, trainer=ConstrainedGRPOTrainer, config=ConstrainedGRPOConfig, rewards=(low_ids, length),
    trainer_arguments=None, **settings,
):  # fmt: skip
    settings = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }
    if issubclass(config, ConstrainedGRPOConfig.__base__):
        settings = {"dashboard": False, "calibration_samples": 0, **settings}
    return trainer(
        path,
        reward_funcs=list(rewards),
        args=config(output_dir=str(folder), **settings),
        train_dataset=prompts(),
        processing_class=tiny_tokenizer(),
        **(trainer_arguments or {}),
    )


def rollout(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [prompts()[index // 4] for index in range(8)]
    return trainer._generate_and_score_completions(rows)
