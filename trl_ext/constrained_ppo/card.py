"""What constrained PPO adds to a model card."""

from collections.abc import Sequence
from typing import Any

from ..model_card import settings_table
from .constrained_ppo_config import ConstrainedPPOConfig
from .dashboard import LogHistory, best_gold, last_value, reward_names
from .lagrangian import Constraint


CITATION = """@inproceedings{moskovitz2024confronting,
    title     = {Confronting Reward Model Overoptimization with Constrained {RLHF}},
    author    = {Moskovitz, Ted and Singh, Aaditya K. and Strouse, DJ and Sandholm, Tuomas and Salakhutdinov, Ruslan and
                 Dragan, Anca D. and McAleer, Stephen},
    booktitle = {The Twelfth International Conference on Learning Representations},
    year      = {2024},
    url       = {https://openreview.net/forum?id=gkfUvn0fLU}
}"""
_SETTINGS = ("method", "objective", "mixing", "whitening", "critic", "gamma", "gae_lambda", "num_iterations", "kl_coef")
_OPTIONAL = ("kl_target", "kl_ceiling", "gold_patience", "early_stop_kl")


def method_section(
    config: ConstrainedPPOConfig,
    log_history: LogHistory,
    model_id: str,
    constraints: Sequence[Constraint] = (),
    stop_reason: str | None = None,
) -> str:
    """
    Markdown of the method's section.

    Args:
        config ([`ConstrainedPPOConfig`]):
            Configuration of the run.
        log_history (`Sequence[dict]`):
            The trainer's log; its newest values are shown.
        model_id (`str`):
            Hub id or folder of the model.
        constraints (`Sequence[Constraint]`, *optional*):
            Constraints, by name of their reward.
        stop_reason (`str`, *optional*):
            Why training ended before its last step.

    Returns:
        `str`
    """
    settings: dict[str, object] = {name: getattr(config, name) for name in _SETTINGS}
    settings |= {name: getattr(config, name) for name in _OPTIONAL if getattr(config, name) is not None}
    if config.learns_multipliers:
        settings |= {
            name: getattr(config, name)
            for name in ("multiplier_squash", "multiplier_learning_rate", "multiplier_proportional")
        }
    parts = ["### Rewards and constraints", settings_table(settings)]
    results = _results(log_history, constraints)
    if results:
        parts.append(results)
    parts.append(_end(log_history, stop_reason))
    parts.append(_loading(config, model_id, reward_names(log_history)))
    return "\n\n".join(part for part in parts if part)


def _results(log_history: LogHistory, constraints: Sequence[Constraint]) -> str:
    """A table with one row for each reward: its constraint and the newest values."""
    names = reward_names(log_history) or [str(constraint.reward) for constraint in constraints]
    if not names:
        return ""
    by_name = {constraint.reward: constraint for constraint in constraints}
    columns = ["reward", "mean", "running average", "constraint", "violation", "multiplier", "weight"]
    keys = ("rewards/{}/mean", "average/{}", None, "violation/{}", "multiplier/{}", "weight/{}")
    if not constraints:
        columns, keys = columns[:3], keys[:2]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in names:
        constraint = by_name.get(name)
        cells = [
            _shown(last_value(log_history, key.format(name))) if key else f"{constraint.kind} {constraint.threshold:.4g}"
            if constraint and constraint.threshold is not None
            else "none"
            for key in keys
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    objective = last_value(log_history, "weight/objective")
    if objective is not None:
        lines.append(f"| the objective |{' |' * (len(columns) - 2)} {_shown(objective)} |")
    return "\n".join(lines)


def _end(log_history: LogHistory, stop_reason: str | None) -> str:
    sentences = []
    step = max((entry.get("step", 0) for entry in log_history), default=0)
    if step:
        sentences.append(f"Means are those of the last rollouts logged, at step {step}.")
    per_response = last_value(log_history, "kl/per_response")
    if per_response is not None:
        per_token = _shown(last_value(log_history, "kl/per_token"))
        sentences.append(
            f"KL from the reference: {_shown(per_response)} nats for a response, {per_token} for a token."
        )
    gold, best = last_value(log_history, "eval_gold"), best_gold(log_history)
    if gold is not None and best is not None:
        sentences.append(f"Gold metric: {_shown(gold)} at the end, at best {_shown(best[1])} at step {best[0]}.")
    if stop_reason:
        sentences.append(f"Training stopped early: {stop_reason}")
    elif step:
        sentences.append("Training was not stopped early.")
    return " ".join(sentences)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _loading(config: ConstrainedPPOConfig, model_id: str, names: Sequence[str]) -> str:
    streams = ", ".join([*(f"`{name}`" for name in names), "the KL"])
    backbone = "its own backbone" if config.critic == "separate" else "the policy's last hidden state"
    return (
        "The policy is a plain model and loads without `trl_ext`.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{model_id}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{model_id}")\n```\n\n'
        f"The critic, with values from {backbone} of {streams}, lies beside it in `critic.safetensors`.\n\n"
        "```python\nfrom trl_ext.constrained_ppo.critic import load_critic\n\n"
        f'critic = load_critic("{model_id}", model)\n```'
    )
