"""Ranges of the fields that every configuration has from [`~transformers.TrainingArguments`].

transformers checks few of them: a negative learning rate or a batch size of 0 fails in mid-training, or trains
nothing.
"""

from typing import Any

from .checks import Range


COUNT, NOT_NEGATIVE, POSITIVE = Range(at_least=1), Range(at_least=0), Range(above=0)
SHARE, DECAY = Range(at_least=0, at_most=1), Range(at_least=0, below=1)
SEED = Range(at_least=0, at_most=2**32 - 1)
WHATEVER_IT_TAKES = Range(also=Any)
_LOG_LEVEL = Range(choices=("detail", "debug", "info", "warning", "error", "critical", "passive"))

TRAINING: dict[str, Range] = {
    "accelerator_config": WHATEVER_IT_TAKES,  # an `AcceleratorConfig` too, once the fields are settled
    "adam_beta1": DECAY,
    "adam_beta2": DECAY,
    "adam_epsilon": NOT_NEGATIVE,
    "data_seed": SEED,
    "dataloader_num_workers": NOT_NEGATIVE,
    "dataloader_prefetch_factor": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
    "debug": Range(also=list | None),  # the argument parser drops its default
    "deepspeed": WHATEVER_IT_TAKES,
    "eval_accumulation_steps": COUNT,
    "eval_delay": NOT_NEGATIVE,
    "eval_steps": NOT_NEGATIVE,
    "fsdp": Range(also=bool | list[str]),
    "gradient_accumulation_steps": COUNT,
    "label_smoothing_factor": DECAY,
    "learning_rate": NOT_NEGATIVE,
    "local_rank": Range(at_least=-1),
    "log_level": _LOG_LEVEL,
    "log_level_replica": _LOG_LEVEL,
    "logging_steps": NOT_NEGATIVE,
    "max_grad_norm": Range(at_least=0, also=type(None)),
    "max_steps": Range(at_least=-1, remedy="Leave it out, or give -1, to train `num_train_epochs`."),
    "neftune_noise_alpha": NOT_NEGATIVE,
    "num_train_epochs": NOT_NEGATIVE,
    "optim": WHATEVER_IT_TAKES,  # [`post_init_with_own_optimizer`] knows the names
    "output_dir": Range(empty=False),
    "per_device_eval_batch_size": COUNT,
    "per_device_train_batch_size": COUNT,
    "resume_from_checkpoint": Range(also=bool),
    "save_steps": NOT_NEGATIVE,
    "save_total_limit": Range(at_least=-1, remedy="Leave it out to keep every checkpoint."),
    "seed": SEED,
    "torch_empty_cache_steps": COUNT,
    "train_sampling_strategy": Range(choices=("random", "sequential", "group_by_length")),
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
}
