"""What constrained PPO adds to a model card."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.model_card import settings_table
from ..equilibrium.value_heads import EPValueHeads
from .constrained_ppo_config import ConstrainedPPOConfig
from .critic import SeparateCritic, ValueHeads
from .dashboard import LogHistory, best_gold, by_reward, last_value, named_constraints, reward_names
from .lagrangian import Constraint
from .run_state import CRITIC_FILE


if TYPE_CHECKING:
    from .constrained_ppo_trainer import ConstrainedPPOTrainer


CITATION = """@inproceedings{moskovitz2024confronting,
    title     = {Confronting Reward Model Overoptimization with Constrained {RLHF}},
    author    = {Moskovitz, Ted and Singh, Aaditya K. and Strouse, DJ and Sandholm, Tuomas and Salakhutdinov, Ruslan
                 and Dragan, Anca D. and McAleer, Stephen},
    booktitle = {The Twelfth International Conference on Learning Representations},
    year      = {2024},
    url       = {https://openreview.net/forum?id=gkfUvn0fLU}
}"""
PAPER = {
    "title": "Confronting Reward Model Overoptimization with Constrained RLHF",
    "id": "2310.04373",
    "citation": CITATION,
}
_SETTINGS = (
    "method",
    "objective",
    "mixing",
    "whitening",
    "critic",
    "gamma",
    "gae_lambda",
    "num_iterations",
    "kl_coef",
)
_OPTIONAL = ("kl_target", "kl_ceiling", "gold_patience", "early_stop_kl")
_EQUILIBRIUM = (
    "critic_head",
    "critic_hidden_features",
    "critic_feedback",
    "critic_feedback_angle",
    "critic_homeostasis_coef",
)


def run_section(trainer: "ConstrainedPPOTrainer", model_id: str) -> str:
    """[`method_section`] of a trainer as it stands."""
    kinds = {ValueHeads: "shared", EPValueHeads: "shared", SeparateCritic: "separate"}
    return method_section(
        trainer.args,
        trainer.state.log_history,
        model_id,
        named_constraints(trainer.controller),
        trainer.stop_reason,
        kinds.get(type(trainer.critic), "module"),
    )


def method_section(
    config: ConstrainedPPOConfig,
    log_history: LogHistory,
    model_id: str,
    constraints: Sequence[Constraint] = (),
    stop_reason: str | None = None,
    critic: str = "shared",
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
        critic (`str`, *optional*, defaults to `"shared"`):
            `"shared"`, `"separate"` or `"module"`, a module of the user's own.

    Returns:
        `str`
    """
    settings: dict[str, object] = {name: getattr(config, name) for name in _SETTINGS}
    settings |= {name: getattr(config, name) for name in _OPTIONAL if getattr(config, name) is not None}
    if config.critic_head == "equilibrium":
        settings |= {name: getattr(config, name) for name in _EQUILIBRIUM}
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
    parts.append(_loading(critic, model_id, reward_names(log_history)))
    return "\n\n".join(part for part in parts if part)


def _results(log_history: LogHistory, constraints: Sequence[Constraint]) -> str:
    """A table with one row for each reward: its constraint and the newest values."""
    grouped = by_reward(constraints)
    names = reward_names(log_history) or list(grouped)
    if not names:
        return ""
    columns = ["reward", "mean", "running average"]
    if constraints:
        columns += ["constraint", "violation", "multiplier", "weight"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in names:
        cells = [f"`{name}`", *_logged(log_history, f"rewards/{name}/mean", f"average/{name}")]
        if constraints:
            stated = ", ".join(f"{c.kind} {_shown(c.threshold)}" for c in grouped.get(name, [])) or "none"
            cells += [stated, *_logged(log_history, f"violation/{name}", f"multiplier/{name}", f"weight/{name}")]
        lines.append(f"| {' | '.join(cells)} |")
    objective = last_value(log_history, "weight/objective")
    if objective is not None:
        lines.append(f"| the objective |{' |' * (len(columns) - 2)} {_shown(objective)} |")
    return "\n".join(lines)


def _logged(log_history: LogHistory, *keys: str) -> list[str]:
    return [_shown(last_value(log_history, key)) for key in keys]


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


def _loading(critic: str, model_id: str, names: Sequence[str]) -> str:
    streams = ", ".join([*(f"`{name}`" for name in names), "the KL"])
    parts = [
        "The policy is a plain model and loads without `trl_ext`.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{model_id}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{model_id}")\n```',
        f"The critic lies beside it in `{CRITIC_FILE}`. At every token it has a value of {streams}, in this order"
        + {
            "shared": ", from the policy's last hidden state.",
            "separate": ", from a backbone of its own.",
            "module": ", from a module of the author's own, without which it cannot be rebuilt.",
        }[critic],
    ]
    if critic != "module":
        arguments = (
            "model.base_model(**inputs).last_hidden_state"
            if critic == "shared"
            else 'inputs["input_ids"], inputs["attention_mask"]'
        )
        parts.append(
            "```python\nfrom trl_ext.constrained_ppo.run_state import critic_from_pretrained\n\n"
            f'critic = critic_from_pretrained("{model_id}")\n'
            'inputs = tokenizer("Some text", return_tensors="pt")\n'
            f"values = critic({arguments})  # (batch, tokens, {len(names) + 1})\n```"
        )
    return "\n\n".join(parts)
