"""Settings without a critic: what `ConstrainedPPOConfig` refuses and settles with `critic="none"`."""

from dataclasses import MISSING
from typing import Any


# Fields beside `critic_...` that say something of a critic, or of advantages from one
_OF_VALUES = (
    "gamma", "gae_lambda", "vf_coef", "kl_vf_coef", "cliprange_value", "cliprange_value_unit", "use_score_scaling",
    "use_score_norm", "score_clip", "adaptive_lambda_alpha", "token_rewards",
)  # fmt: skip


def settle_without_critic(args: Any) -> None:
    """Refuses what says nothing without a critic, and settles the two names of the KL's coefficient."""
    for name, own in args.__dataclass_fields__.items():
        if not name.startswith("critic_") and name not in _OF_VALUES:
            continue
        default = own.default if own.default_factory is MISSING else own.default_factory()
        if getattr(args, name) != default:
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` needs a critic and `critic='none'`. Leave it out, or set "
                "`critic='shared'`."
            )
    if args.num_generations is not None and args.num_generations < 2:
        raise ValueError(
            f"`critic='none'` compares the completions of a prompt and `num_generations={args.num_generations}`. "
            "Set it to 2 or more, such as 8."
        )
    if args.whitening is not None and (not args.constraints or args.method == "sat"):
        raise ValueError(
            f"`whitening={args.whitening!r}` scales what multipliers weigh, and with `critic='none'` here is "
            "nothing else. Leave it out; `scale_rewards` and `multi_objective_aggregation` scale the rewards."
        )
    if args.beta and args.kl_coef not in (args.beta, type(args).kl_coef):
        raise ValueError(
            f"`beta={args.beta}` and `kl_coef={args.kl_coef}` name the same coefficient with `critic='none'`. "
            "Give one of them."
        )
    args.kl_coef = args.beta or args.kl_coef


def check_without_critic(args: Any) -> None:
    """Refuses what contradicts itself without a critic, once the preset is filled in."""
    if args.group_baseline == "leave_one_out" and args.multi_objective_aggregation == "normalize_then_sum":
        raise ValueError(
            "`group_baseline='leave_one_out'` changes the size of an advantage only, which "
            "`multi_objective_aggregation='normalize_then_sum'` takes out again. Leave out one of them."
        )
    if any(one.per_prompt and one.probability is not None for one in args.parsed_constraints()):
        raise ValueError(
            "A constraint on the share of prompts (`per_prompt` with `probability`) is the same for all "
            "completions of a prompt, so that with `critic='none'` it has no advantage. Leave out one of the two, "
            "or set `critic='shared'`."
        )
    if args.whitening == "mixture" and args.learns_multipliers:
        reason = "The multipliers' weights would cancel" if args.objective == "kl" else ""
        if args.multiplier_update == "minibatch":
            reason = "A minibatch is no rollout to take the spread over"
        if reason:
            raise ValueError(
                f"`whitening='mixture'` brings the mixed advantages of a rollout to unit size. {reason}: use "
                "`whitening='spread'`."
            )
