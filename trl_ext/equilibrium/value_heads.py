"""Value heads of a critic that relax to a fixed point."""

from collections.abc import Sequence
from typing import Any

import torch

from .head import EPHead
from .settings import (
    AUTO,
    FeedbackName,
    HeadSettings,
    check_feedback,
    check_homeostasis,
    check_spectral_cap,
    check_widths,
)
from .settings import SpectralCap as SpectralCap
from .settings import read_spectral_cap as read_spectral_cap


# Of heads that were saved before the cap was a setting
EARLIER_SPECTRAL_CAP = 0.9


class EPValueHeads(EPHead):
    """
    [`EPHead`] as critic of [`ConstrainedPPOTrainer`]: values that start at zero, in float32.

    Tokens without a value loss, of prompts and padding, cost nothing in the backward pass.

    Args:
        hidden_size (`int`):
            Width of the backbone.
        num_heads (`int`):
            Number of streams: rewards, and one for the KL.
        hidden_features (`int` or `list[int]`, *optional*, defaults to `(64, 64)`):
            Widths of the relaxing layers.
        feedback, feedback_angle, spectral_cap (*optional*):
            See [`HeadSettings`].

    Raises:
        ValueError: If a width is not positive, or the feedback is wrong.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        hidden_features: int | Sequence[int] = (64, 64),
        feedback: FeedbackName = HeadSettings.feedback,
        feedback_angle: float = HeadSettings.feedback_angle,
        spectral_cap: SpectralCap = HeadSettings.spectral_cap,
    ):
        super().__init__(
            hidden_size, hidden_features, num_heads, feedback=feedback, feedback_angle=feedback_angle,
            spectral_cap=spectral_cap,
        )  # fmt: skip

    @classmethod
    def from_saved(cls, settings: dict[str, Any]) -> "EPValueHeads":
        """Heads of saved [`~EPValueHeads.settings`], which may be of before the cap was one of them."""
        return cls(**{"spectral_cap": EARLIER_SPECTRAL_CAP, **settings})

    def settings(self) -> dict[str, Any]:
        """Arguments that build heads of the same shape, as JSON can hold them."""
        return {
            "hidden_size": self.in_features,
            "num_heads": self.out_features,
            "hidden_features": self.hidden_features,
            "feedback": self.feedback,
            "feedback_angle": self.feedback_angle,
            "spectral_cap": self.spectral_cap,
        }

    def initial_parameters(self, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """As [`EPHead.initial_parameters`], with a readout of zero."""
        values = super().initial_parameters(generator)
        return values | {"readout_weight": torch.zeros_like(values["readout_weight"])}

    def forward(self, hidden: torch.Tensor | None, **kwargs: object) -> torch.Tensor:  # type: ignore[override]
        """Values of shape `(B, T, num_heads)`, float32, from hidden states `(B, T, H)` of any floating dtype."""
        return super().forward(None if hidden is None else hidden.float(), **kwargs)  # type: ignore[arg-type]


def without_subspaces(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Saved tensors without the subspace that each capped weight had in files of earlier versions."""
    return {name: tensor for name, tensor in state.items() if not name.endswith("_subspace")}


def check_value_heads(owner: Any, prefix: str = "") -> None:
    """
    Refuses settings of [`EPValueHeads`] and of the weight of their homeostasis objective that cannot be used.

    Args:
        owner (`Any`):
            Object that has them: `hidden_features`, `feedback`, `feedback_angle`, `spectral_cap` and
            `homeostasis_coef`.
        prefix (`str`, *optional*):
            What their names begin with.

    Raises:
        ValueError: If one cannot be used.
    """
    feedback = getattr(owner, f"{prefix}feedback")
    check_widths(f"{prefix}hidden_features", getattr(owner, f"{prefix}hidden_features"))
    check_feedback(feedback, getattr(owner, f"{prefix}feedback_angle"), prefix=prefix)
    check_spectral_cap(owner, f"{prefix}spectral_cap")
    check_homeostasis(getattr(owner, f"{prefix}homeostasis_coef"), feedback, prefix=prefix)


def refuse_value_heads(owner: Any, prefix: str) -> None:
    """
    Refuses settings of [`EPValueHeads`] where linear heads are built, which have none.

    Args:
        owner (`Any`):
            Object that has them, as in [`check_value_heads`].
        prefix (`str`):
            What their names begin with.

    Raises:
        ValueError: If one is not what it is when left out.
    """
    unused = {"feedback": "symmetric", "feedback_angle": 0.0, "homeostasis_coef": 0.0, "spectral_cap": AUTO}
    for name, value in unused.items():
        found = getattr(owner, prefix + name)
        if found != value:
            raise ValueError(
                f"`{prefix}{name}={found!r}` needs `{prefix}head='equilibrium'`: linear heads have no recurrent "
                "weights. Set that, or leave it out."
            )
