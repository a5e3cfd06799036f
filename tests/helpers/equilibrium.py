"""Heads, reward models and their trainers, tiny and quick."""

import torch
from trl import RewardConfig

from tests.helpers.tiny import tiny_pairs, tiny_tokenizer
from trl_ext import EPModelForSequenceClassification, EPRewardConfig, EPRewardTrainer


# Padded on neither side, right and left
IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0], [0, 0, 11, 12, 13]])
MASK = (IDS != 0).long()

ASYMMETRIC = {"feedback": "asymmetric", "feedback_angle": 90.0}
COMMON = {
    "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "use_cpu": True,
    "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 7,
}  # fmt: skip


def scaled(head, factor):
    """The head with recurrent weights multiplied by `factor`."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.startswith(("forward_weight", "backward_weight")):
                parameter.mul_(factor)
    return head


def reward_model(folder, seed=0, **settings):
    torch.manual_seed(seed)
    return EPModelForSequenceClassification.from_pretrained(folder, num_labels=1, hidden_features=[8, 8], **settings)


def trainer_of(kind, folder, output, model=None, peft_config=None, **settings):
    config = EPRewardConfig if kind is EPRewardTrainer else RewardConfig
    return kind(
        model=reward_model(folder) if model is None else model,
        args=config(output_dir=str(output), **{"gradient_checkpointing": False, **COMMON, **settings}),
        train_dataset=tiny_pairs(16),
        eval_dataset=tiny_pairs(8, seed=3),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )
