"""Checks of the critic's settings."""

from typing import TYPE_CHECKING

from ..equilibrium.settings import check_feedback, check_homeostasis


if TYPE_CHECKING:
    from .constrained_ppo_config import ConstrainedPPOConfig


# Settings of equilibrium heads that linear ones do not have, with the values that leave them out
_FEEDBACK = {"critic_feedback": "symmetric", "critic_feedback_angle": 0.0, "critic_homeostasis_coef": 0.0}


def check_critic(args: "ConstrainedPPOConfig") -> None:
    """
    Refuses a critic that cannot be built.

    Args:
        args ([`ConstrainedPPOConfig`]):
            Configuration.

    Raises:
        ValueError: If a setting is wrong, or belongs to another kind of critic.
    """
    if args.critic == "shared" and args.critic_model_name_or_path is not None:
        raise ValueError(
            f"`critic_model_name_or_path={args.critic_model_name_or_path!r}` needs `critic='separate'`: value heads "
            "on the policy have no backbone of their own."
        )
    if args.critic_head not in ("linear", "equilibrium"):
        raise ValueError(f"`critic_head` must be 'linear' or 'equilibrium', got {args.critic_head!r}.")
    if args.critic_head == "linear":
        for name, unused in _FEEDBACK.items():
            if getattr(args, name) != unused:
                raise ValueError(
                    f"`{name}={getattr(args, name)!r}` needs `critic_head='equilibrium'`: linear heads have no "
                    "feedback weights. Set that, or leave it out."
                )
        return
    if not all(width >= 1 for width in args.critic_hidden_features or [0]):
        raise ValueError(f"`critic_hidden_features` must be positive, got {args.critic_hidden_features}.")
    check_feedback(args.critic_feedback, args.critic_feedback_angle, prefix="critic_")
    check_homeostasis(args.critic_homeostasis_coef, args.critic_feedback, prefix="critic_")
