"""Arguments of TRL's `PPOTrainer` and `PPOConfig`, old and older, and what stands for each here."""

from collections.abc import Iterable


# For `docs/migrating_from_trl_ppo.md`, which has the whole table
RETIRED = {
    # PPOTrainer
    "reward_model": "Give `reward_funcs`: one or several functions, models or ids.",
    "value_model": "Give `critic_model` with `critic='separate'`, or `critic_model_name_or_path` in the config.",
    "data_collator": "Leave it out: prompts are padded by the trainer.",
    "tokenizer": "Give `processing_class`.",
    "config": "Give `args`, a `ConstrainedPPOConfig`.",
    "dataset": "Give `train_dataset`, with a column `prompt`.",
    # PPOConfig
    "total_episodes": "Set `max_steps`: episodes / responses of a rollout * minibatches * epochs; or "
    "`num_train_epochs`.",
    "num_mini_batches": "Set `steps_per_generation`: minibatches of a rollout are `steps_per_generation / "
    "gradient_accumulation_steps`.",
    "num_ppo_epochs": "Set `num_iterations`.",
    "response_length": "Set `max_completion_length`.",
    "stop_token": "Leave it out: a response ends at the end-of-sequence tokens of tokenizer and model. For others set "
    "`generation_kwargs={'eos_token_id': ...}`.",
    "stop_token_id": "Set `generation_kwargs={'eos_token_id': ...}`.",
    "local_rollout_forward_batch_size": "Set `per_device_train_batch_size`, which rollouts are scored in, too.",
    "num_sample_generations": "Set `log_completions=True`.",
    "sft_model_path": "Give `model`; in a recipe `model_name_or_path`.",
    "reward_model_path": "Give `reward_funcs`.",
    "cliprange": "Set `epsilon`, and `epsilon_high` for another upper side.",
    "lam": "Set `gae_lambda`.",
    "whiten_rewards": "Leave it out: advantages are whitened, see `whitening`; for rewards of unit spread set "
    "`use_score_scaling`.",
    "model_adapter_name": "Leave it out: one adapter is trained.",
    "ref_adapter_name": "Leave it out: the reference is the policy with its adapter off.",
    "dataset_num_proc": "Leave it out: nothing is tokenised before training.",
    "batch_size": "Set `generation_batch_size`, or `steps_per_generation`.",
    "mini_batch_size": "Set `per_device_train_batch_size` and `gradient_accumulation_steps`.",
    "ppo_epochs": "Set `num_iterations`.",
    "init_kl_coef": "Set `kl_coef`.",
    "target": "Set `kl_target`, in nats for each token.",
    "early_stopping": "Set `early_stop_kl`.",
    "target_kl": "Set `early_stop_kl`.",
}


def refuse_retired(names: Iterable[str], owner: str) -> None:
    """Refuses arguments of TRL's PPO that have another name here, with that name. Unknown ones are left to Python."""
    for name in names:
        if name in RETIRED:
            raise TypeError(
                f"`{name}` is an argument of TRL's PPO and none of `{owner}`. {RETIRED[name]} All of them stand in "
                "docs/migrating_from_trl_ppo.md."
            )
