"""Several rewards as one: their mean is the reward, and how far they disagree tells where none is to be trusted.

    r = mean_m r_m,    d = sqrt(mean_m (r_m - r)^2)        for each completion, over the members m

A policy that over-optimises goes where its rewards were not trained, and there members disagree. [`RewardEnsemble`]
gives both numbers; [`DisagreementAlarm`] warns, without a gold metric, when the second leaves the range that it had
before training.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from trl import apply_chat_template, is_conversational

from .._upstream import is_async_callable
from .constrained_ppo_config import ConstrainedPPOConfig
from .reward_functions import RewardFunction
from .reward_lengths import keep_within_positions


logger = get_logger(__name__)
Metrics = dict[str, list[float]]


class RewardEnsemble:
    """
    A reward function made of several rewards on one scale.

    `ensemble` is the mean over its members and `ensemble.disagreement` their standard deviation; both are reward
    functions, and share one call of the members for each batch. Given to the trainer alone, an ensemble's disagreement
    is logged and watched; given beside it with weight 0, it can be constrained.

    Args:
        members (`Sequence`):
            Two rewards or more: functions, sequence classifiers with one label, or their names or folders.
        name (`str`, *optional*, defaults to `"ensemble"`):
            Name of the mean; the disagreement is `<name>_disagreement`.
        processing_classes (`Sequence`, *optional*):
            Tokenizer of each member, `None` for functions and for models whose own is meant.

    Raises:
        ValueError: If there are fewer than two members, another number of tokenizers, or an async member.

    Example:

    ```python
    from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer
    from trl_ext.constrained_ppo.ensemble import RewardEnsemble

    helpful = RewardEnsemble(["org/reward-a", "org/reward-b", "org/reward-c"], name="helpful")
    trainer = ConstrainedPPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=[helpful, helpful.disagreement],
        args=ConstrainedPPOConfig(
            objective="rewards",
            reward_weights=[1.0, 0.0],
            constraints=[{"reward": "helpful_disagreement", "threshold": 0.3, "kind": "<="}],
        ),
        train_dataset=dataset,
    )
    ```
    """

    def __init__(
        self, members: Sequence[Any], name: str = "ensemble", processing_classes: Sequence[Any] | None = None
    ):
        if len(members) < 2:
            raise ValueError(f"`members` of the ensemble {name!r} must be two rewards or more, got {len(members)}.")
        tokenizers = [None] * len(members) if processing_classes is None else list(processing_classes)
        if len(tokenizers) != len(members):
            raise ValueError(
                f"`processing_classes` has {len(tokenizers)} entries and the ensemble {name!r} {len(members)} "
                "members. Give one for each, `None` for functions."
            )
        self.name, self.__name__ = name, name
        self.members = [_scorer(member, tokenizer) for member, tokenizer in zip(members, tokenizers, strict=True)]
        for member in self.members:
            if is_async_callable(member):
                raise ValueError(
                    f"The ensemble {name!r} has an async member, {member!r}. Give functions that return their "
                    "numbers, or an async reward function that asks all members and returns their mean."
                )
        self._batch: Any = None
        self._scores = torch.empty(0)

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        """The mean over the members for each completion."""
        return self.scores(prompts, completions, **columns).mean(dim=1).tolist()

    @property
    def disagreement(self) -> "Disagreement":
        """The reward function that gives the standard deviation over the members."""
        return Disagreement(self)

    def scores(self, prompts: list[Any], completions: list[Any], **columns: Any) -> torch.Tensor:
        """
        What each member says.

        Args:
            prompts (`list`):
                Prompts.
            completions (`list`):
                Completions.
            columns (`Any`):
                The other arguments of reward functions.

        Returns:
            `torch.Tensor` of shape `(B, M)`, float64.

        Raises:
            ValueError: If a member gives another number of rewards than there are completions.
        """
        if self._batch is not None and self._batch[0] is prompts and self._batch[1] is completions:
            return self._scores
        found = []
        for place, member in enumerate(self.members):
            values = member(prompts=prompts, completions=completions, **columns)
            if len(values) != len(completions):
                raise ValueError(
                    f"Member {place} of the ensemble {self.name!r} returned {len(values)} rewards for "
                    f"{len(completions)} completions. Return one for each."
                )
            found.append([math.nan if value is None else float(value) for value in values])
        self._batch, self._scores = (prompts, completions), torch.tensor(found, dtype=torch.float64).t()
        return self._scores

    def newest_disagreement(self) -> torch.Tensor:
        """The standard deviation over the members for each completion of the newest batch, `(B,)`, float64."""
        return self._scores.std(dim=1, unbiased=False)


class Disagreement:
    """
    The standard deviation over the members of an ensemble, as a reward function.

    Args:
        ensemble ([`RewardEnsemble`]):
            The ensemble.
    """

    def __init__(self, ensemble: RewardEnsemble):
        self.ensemble, self.__name__ = ensemble, f"{ensemble.name}_disagreement"

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        """The standard deviation for each completion."""
        return self.ensemble.scores(prompts, completions, **columns).std(dim=1, unbiased=False).tolist()


class _ModelScorer:
    """A sequence classifier as a reward function."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any):
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    def __call__(self, prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        if is_conversational({"prompt": prompts[0]}):
            both = [{"messages": prompt + own} for prompt, own in zip(prompts, completions, strict=True)]
            texts = [apply_chat_template(one, self.tokenizer)["text"] for one in both]
        else:
            texts = [prompt + own for prompt, own in zip(prompts, completions, strict=True)]
        inputs = self.tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        # Not before the first call: until the trainer is built nobody knows which device is meant
        device = PartialState().device
        with torch.no_grad():
            return self.model.to(device)(**inputs.to(device)).logits[:, 0].tolist()


def _scorer(member: Any, tokenizer: Any) -> Callable[..., Any]:
    """A member as a reward function."""
    if isinstance(member, str):
        name, member = member, AutoModelForSequenceClassification.from_pretrained(member, num_labels=1)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(name)
    if not isinstance(member, nn.Module):
        return member
    model = cast(PreTrainedModel, member)
    keep_within_positions(model, model.config.name_or_path)
    return _ModelScorer(model, tokenizer or AutoTokenizer.from_pretrained(model.config.name_or_path))


class DisagreementAlarm:
    """
    Says when the members of an ensemble disagree more than they did at the start.

    The first `num_samples` completions, and at least one rollout, give mean `m` and spread `s` of the disagreement
    over completions; a later rollout whose mean is above `m + deviations * s` is out of range.

    Args:
        name (`str`):
            Name of the ensemble.
        num_samples (`int`):
            Completions that calibrate.
        deviations (`float`):
            How many spreads the mean of a rollout may rise.
    """

    def __init__(self, name: str, num_samples: int, deviations: float):
        self.name, self.num_samples, self.deviations = name, num_samples, deviations
        self._samples: list[float] = []
        self._calibrated: tuple[float, float] | None = None

    def check(self, disagreement: Sequence[float]) -> str | None:
        """
        Takes in a rollout.

        Args:
            disagreement (`Sequence[float]`):
                Standard deviation over the members for each completion of all processes.

        Returns:
            `str` or `None`: what is wrong, or `None` while it calibrates and in range.
        """
        if self._calibrated is None:
            self._samples.extend(disagreement)
            if len(self._samples) >= self.num_samples:
                samples = torch.tensor(self._samples, dtype=torch.float64)
                self._calibrated, self._samples = (float(samples.mean()), float(samples.std(unbiased=False))), []
            return None
        mean, (start, spread) = sum(disagreement) / len(disagreement), self._calibrated
        bound = start + self.deviations * spread
        if mean <= bound:
            return None
        return (
            f"The members of the ensemble {self.name!r} disagree by {mean:.4g} on average, above {bound:.4g}: at the "
            f"start it was {start:.4g} with a spread of {spread:.4g} (`ensemble_alarm_deviations="
            f"{self.deviations:g}`). Their mean is no longer to be trusted: constrain the disagreement or end the run."
        )

    def excess(self, mean: float) -> float | None:
        """How many spreads a mean lies above the start; `None` while it calibrates, or where there was no spread."""
        if self._calibrated is None or self._calibrated[1] == 0:
            return None
        return (mean - self._calibrated[0]) / self._calibrated[1]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"samples": self._samples, "calibrated": self._calibrated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`]."""
        self._samples = list(state["samples"])
        self._calibrated = None if state["calibrated"] is None else (state["calibrated"][0], state["calibrated"][1])


class EnsembleMonitor:
    """
    The alarms of a run's ensembles.

    Args:
        rewards (`Sequence`):
            Rewards of the run.
        weights (`Sequence[float]`):
            Their weights.
        args ([`ConstrainedPPOConfig`]):
            Configuration.

    Raises:
        ValueError: If two ensembles have one name, or the policy would seek disagreement.
    """

    def __init__(self, rewards: Sequence[Any], weights: Sequence[float], args: ConstrainedPPOConfig):
        self.ensembles: dict[str, RewardEnsemble] = {}
        self.stops = args.ensemble_alarm == "stop"
        for reward, weight in zip(rewards, weights, strict=True):
            reward = reward.function if isinstance(reward, RewardFunction) else reward
            if isinstance(reward, Disagreement) and args.objective == "rewards" and weight > 0:
                raise ValueError(
                    f"`reward_weights` gives {reward.__name__!r} the weight {weight:g}, so the policy would seek what "
                    "the members disagree on. Set its weight to 0, and constrain it with `kind='<='`."
                )
            ensemble = reward.ensemble if isinstance(reward, Disagreement) else reward
            if (
                isinstance(ensemble, RewardEnsemble)
                and self.ensembles.setdefault(ensemble.name, ensemble) is not ensemble
            ):
                raise ValueError(f"Two ensembles have the name {ensemble.name!r}. Give each a `name` of its own.")
        self.alarms = {
            name: DisagreementAlarm(name, args.calibration_samples, args.ensemble_alarm_deviations)
            for name in self.ensembles
        }

    def observe(
        self, metrics: Metrics, gather: Callable[[torch.Tensor], torch.Tensor], device: torch.device, training: bool
    ) -> str | None:
        """
        Records the disagreement of the newest rollout and, in training, checks it.

        Args:
            metrics (`dict[str, list[float]]`):
                Where to record.
            gather (`Callable`):
                All processes' rows of a tensor.
            device (`torch.device`):
                Device of the processes' tensors.
            training (`bool`):
                Whether the rollout is one of training.

        Returns:
            `str` or `None`: why the run is to end, or `None`.
        """
        reasons = []
        for name, ensemble in self.ensembles.items():
            found = gather(ensemble.newest_disagreement().float().to(device)).tolist()
            mean, alarm = sum(found) / len(found), self.alarms[name]
            metrics[f"disagreement/{name}"].append(mean)
            excess = alarm.excess(mean)
            if excess is not None:
                metrics[f"disagreement_deviations/{name}"].append(excess)
            message = alarm.check(found) if training else None
            if message is not None:
                reasons.append(message)
                if not self.stops:
                    logger.warning(message, main_process_only=True)
        return reasons[0] if reasons and self.stops else None

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, by name of the ensemble."""
        return {name: alarm.state_dict() for name, alarm in self.alarms.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`]."""
        for name, alarm in self.alarms.items():
            if name in state:
                alarm.load_state_dict(state[name])
