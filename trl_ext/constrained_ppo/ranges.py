"""Ranges of every field of [`ConstrainedPPOConfig`], TRL's own among them; types and choices are its annotations."""

from numbers import Integral
from typing import Any

from ..core.checks import Range, check_fields, check_value
from ..core.training_ranges import COUNT, DECAY, NOT_NEGATIVE, POSITIVE, SHARE, TRAINING
from .multipliers import RANGES as MULTIPLIERS


_LEAVE_OUT = "Leave it out to go without."
_POSITIVE_OR_NONE = Range(above=0, remedy=_LEAVE_OUT)
_PORT = Range(at_least=0, at_most=65535)

GRPO: dict[str, Range] = {
    "beta": NOT_NEGATIVE,
    "delta": POSITIVE,
    "epsilon": NOT_NEGATIVE,
    "epsilon_high": NOT_NEGATIVE,
    "generation_batch_size": COUNT,
    "importance_sampling_level": Range(choices=("token", "sequence")),
    "max_completion_length": COUNT,
    "max_tool_calling_iterations": COUNT,
    "min_p": SHARE,
    "num_completions_to_print": NOT_NEGATIVE,
    "num_generations": COUNT,
    "num_generations_eval": COUNT,
    "num_iterations": COUNT,
    "off_policy_mask_threshold": NOT_NEGATIVE,
    "pad_to_multiple_of": COUNT,
    "ref_model_mixup_alpha": SHARE,
    "ref_model_sync_steps": COUNT,
    "repetition_penalty": POSITIVE,
    "router_aux_loss_coef": NOT_NEGATIVE,
    "sapo_temperature_neg": POSITIVE,
    "sapo_temperature_pos": POSITIVE,
    "scale_rewards": Range(choices=("group", "batch", "none"), also=bool),
    "steps_per_generation": COUNT,
    "temperature": POSITIVE,
    "top_entropy_quantile": SHARE,
    "top_k": Range(at_least=-1),
    "top_p": Range(above=0, at_most=1),
    "vespo_k_neg": NOT_NEGATIVE,
    "vespo_k_pos": NOT_NEGATIVE,
    "vespo_lambda_neg": NOT_NEGATIVE,
    "vespo_lambda_pos": NOT_NEGATIVE,
    "vllm_gpu_memory_utilization": Range(above=0, at_most=1),
    "vllm_group_port": _PORT,
    "vllm_importance_sampling_cap": POSITIVE,
    "vllm_importance_sampling_clip_max": POSITIVE,
    "vllm_importance_sampling_clip_min": NOT_NEGATIVE,
    "vllm_max_model_length": COUNT,
    "vllm_mode": Range(choices=("server", "colocate")),
    "vllm_server_port": _PORT,
    "vllm_server_timeout": POSITIVE,
    "vllm_tensor_parallel_size": COUNT,
}
RANGES: dict[str, Range] = {
    **TRAINING,
    **GRPO,
    **{f"multiplier_{name.replace('maximum', 'max')}": within for name, within in MULTIPLIERS.items()},
    "adaptive_lambda_alpha": _POSITIVE_OR_NONE,
    "calibration_samples": NOT_NEGATIVE,
    "cliprange_value": NOT_NEGATIVE,
    "critic_feedback_angle": Range(at_least=0, at_most=180),
    "critic_hidden_features": Range(at_least=1, empty=False),
    "critic_homeostasis_coef": NOT_NEGATIVE,
    "critic_lambda": SHARE,
    "critic_learning_rate": NOT_NEGATIVE,
    "critic_max_grad_norm": _POSITIVE_OR_NONE,
    "critic_model_name_or_path": Range(empty=False),
    "critic_score_reward": Range(empty=False),
    "critic_warmup_steps": NOT_NEGATIVE,
    "early_stop_kl": _POSITIVE_OR_NONE,
    "ensemble_alarm_deviations": POSITIVE,
    "gae_lambda": SHARE,
    "gamma": SHARE,
    "gold_patience": Range(at_least=1, remedy=_LEAVE_OUT),
    "kl_ceiling": _POSITIVE_OR_NONE,
    "kl_coef": NOT_NEGATIVE,
    "kl_step": Range(above=0, below=1),
    "kl_target": _POSITIVE_OR_NONE,
    "kl_vf_coef": NOT_NEGATIVE,
    "missing_eos_penalty": NOT_NEGATIVE,
    "multiplier_spread_ema": DECAY,
    "reward_retries": NOT_NEGATIVE,
    "reward_retry_seconds": NOT_NEGATIVE,
    "reward_timeout": _POSITIVE_OR_NONE,
    "score_clip": _POSITIVE_OR_NONE,
    "search": Range(also=Any),  # a [`ThresholdSearchConfig`] in the making, which has checks of its own
    "vf_coef": Range(at_least=0, empty=False),
}


def check_ranges(args: Any) -> None:
    """
    Refuses fields of a [`ConstrainedPPOConfig`] whose type, choice or range is wrong, before anything reads them.

    Args:
        args ([`ConstrainedPPOConfig`]):
            The configuration; numbers that a command line gave as text become numbers, and one width a list of one.

    Raises:
        ValueError: If a field is wrong.
    """
    args.vf_coef = _as_numbers(args.vf_coef)
    check_value("vf_coef", args.vf_coef, float | list[float], RANGES["vf_coef"], 0.5)
    widths: Any = args.critic_hidden_features
    if isinstance(widths, Integral) and not isinstance(widths, bool):
        args.critic_hidden_features = [int(widths)]
    check_fields(args, RANGES)


def _as_numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_numbers(entry) for entry in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
