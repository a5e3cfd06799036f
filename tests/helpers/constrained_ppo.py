"""Rewards, prompts and trainers of constrained PPO on tiny models, for its tests."""

import torch
from datasets import Dataset

from tests.helpers.tiny import WORDS, tiny_tokenizer
from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer


XI = {"method": "xi", "constraints": [{"reward": "low_ids", "threshold": 0.7}, {"reward": 1, "threshold": 0.5}]}


def low_ids(completion_ids, **columns):
    """Share of token ids below 20: what the policy can learn in a few steps."""
    return [sum(index < 20 for index in ids) / max(1, len(ids)) for ids in completion_ids]


def length(completion_ids, **columns):
    return [len(ids) / 8 for ids in completion_ids]


def prompts(count=64):
    words = ["the film", "a book", "we liked the", "i hated a meal"]
    return Dataset.from_list([{"prompt": words[index % 4]} for index in range(count)])


def fixed_completions(batch, trainer):
    """
    A `rollout_func`: completions that follow from the step and the place in the rollout of all processes, as sampling
    would not.
    """
    start = trainer.accelerator.process_index * len(batch)
    completions = []
    for row in range(start, start + len(batch)):
        generator = torch.Generator().manual_seed(1000 * trainer.state.global_step + row)
        count = int(torch.randint(2, 7, (), generator=generator))
        completions.append(torch.randint(3, len(WORDS), (count,), generator=generator).tolist())
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in batch]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def make(folder, path, *, rewards=(low_ids, length), trainer_arguments=None, train_dataset=None, **settings):
    settings = {
        "method": "ppo",
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-2,
        "max_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "calibration_samples": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "dashboard": False,
        **settings,
    }
    return ConstrainedPPOTrainer(
        path,
        reward_funcs=list(rewards),
        args=ConstrainedPPOConfig(output_dir=str(folder), **settings),
        train_dataset=prompts() if train_dataset is None else train_dataset,
        processing_class=tiny_tokenizer(),
        **(trainer_arguments or {}),
    )


def rollout(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [prompts()[index] for index in range(8)]
    return trainer._generate_and_score_completions(rows)


def assert_same(whole, resumed):
    """Two trainers have the same weights, states and logs."""
    for (name, p), (_, q) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert resumed.controller.state_dict() == whole.controller.state_dict()
    if whole.multipliers is not None:
        assert resumed.multipliers.state_dict() == whole.multipliers.state_dict()
    kept = ("loss", "rewards/low_ids/mean", "kl/per_response", "weight/low_ids", "average/low_ids")
    histories = [
        [{key: entry.get(key) for key in kept} for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (whole, resumed)
    ]
    assert histories[0] == histories[1]
