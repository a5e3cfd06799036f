"""The head inside a model, whatever wraps it, and its metrics in a trainer's log."""

from collections import defaultdict
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn

from .._upstream import gathered_state_dict
from ..core.parameter_groups import move_to_own_groups
from .feedback import check_homeostasis
from .head import EPHead
from .modeling import EPModelForSequenceClassification


def equilibrium_model(model: nn.Module) -> EPModelForSequenceClassification:
    """
    The classifier itself, without an adapter's wrapper.

    Args:
        model ([`EPModelForSequenceClassification`] or `PeftModel` on one):
            Model, not wrapped by an engine.

    Raises:
        TypeError: If it has no equilibrium head.
    """
    found: Any = model
    if is_peft_model(model):
        found = found.get_base_model()
    if not isinstance(found, EPModelForSequenceClassification):
        raise TypeError(
            f"`model` is a `{type(found).__name__}`, which has no equilibrium head. Give an "
            "`EPModelForSequenceClassification`; `EPModelForSequenceClassification.from_backbone(model)` makes one."
        )
    return found


def active_head(model: nn.Module) -> EPHead:
    """The head that runs: under PEFT's `modules_to_save=["score"]`, the active adapter's copy."""
    score: Any = equilibrium_model(model).score
    return score if isinstance(score, EPHead) else score.modules_to_save[score.active_adapter]


def restore_float32(head: EPHead) -> None:
    """Casts a head in half precision to float32, in which it relaxes; one in float32 or float64 stays as it is."""
    if head.input_weight.dtype in (torch.float16, torch.bfloat16):
        head.float()


def gathered_asymmetry(head: EPHead) -> dict[str, float]:
    """
    [`EPHead.asymmetry`] of a head whose weights may be sharded. All processes must call it.

    Args:
        head ([`EPHead`]):
            Head with asymmetric feedback.
    """
    with torch.random.fork_rng(devices=[]):
        whole = EPHead(head.in_features, head.hidden_features, head.out_features, feedback="asymmetric")
    whole.load_state_dict(gathered_state_dict(head), strict=False)  # without the cap's buffers
    return whole.asymmetry()


def use_homeostasis_coef(model: EPModelForSequenceClassification, value: float | None) -> None:
    """
    Sets the weight of the homeostasis objective in a model's configuration; `None` leaves the model's own.

    Raises:
        ValueError: If it is above 0 and the feedback is symmetric.
    """
    if value is None:
        return
    check_homeostasis(value, model.config.feedback)
    model.config.homeostasis_coef = value


def use_head_learning_rate(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float | None) -> None:
    """
    Gives the head's parameters groups of their own, with the weight decay they have. `None` leaves them as they are.

    Args:
        optimizer (`torch.optim.Optimizer`):
            Optimizer without state.
        model (`nn.Module`):
            Model that it steps, whatever wraps it.
        learning_rate (`float`, *optional*):
            Their learning rate.
    """
    if learning_rate is None:
        return
    heads = {id(parameter) for name, parameter in model.named_parameters() if "score" in name.split(".")}
    groups = [
        ([parameter for parameter in group["params"] if id(parameter) in heads], group["weight_decay"])
        for group in optimizer.param_groups
    ]
    move_to_own_groups(optimizer, groups, learning_rate, tag="equilibrium_head")


class HeadMetrics:
    """
    Collects the head's metrics between two entries of a trainer's log.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer of an [`EPModelForSequenceClassification`].
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._values: dict[str, list[float]] = defaultdict(list)

    def record(self, outputs: Any) -> None:
        """Takes the head's statistics after a forward, and the objective among its outputs."""
        for name, value in active_head(self.trainer.model).metrics().items():
            self._values[name].append(value)
        if outputs.homeostasis_loss is not None:
            self._values["ep/homeostasis_loss"].append(outputs.homeostasis_loss.detach().mean().item())

    def pop(self) -> dict[str, float]:
        """
        Means since the last call, of this process; counts are the last ones. Names as in [`EPHead.metrics`] and, with
        asymmetric feedback, [`EPHead.asymmetry`]. All processes must call it.
        """
        values, self._values = self._values, defaultdict(list)
        if not values:
            return {}
        if not self.trainer.model.training:
            return {f"eval_{name}": _mean(values[name]) for name in ("ep/free_sweeps", "ep/free_residual")}
        head = active_head(self.trainer.model)
        asymmetry = gathered_asymmetry(head) if head.feedback == "asymmetric" else {}
        return {name: seen[-1] if "num_" in name else _mean(seen) for name, seen in values.items()} | asymmetry


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
