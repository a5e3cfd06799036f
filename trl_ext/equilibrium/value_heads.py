"""Value heads of a critic that relax to a fixed point."""

from collections.abc import Sequence
from typing import Any

import torch

from .head import EPHead
from .settings import FeedbackName, HeadSettings, check_feedback, check_homeostasis, check_widths


# Below 1, where the relaxation of two layers always contracts, with room for the error of the cap's own iteration
SPECTRAL_CAP = 0.9


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
            Widths of the relaxing layers; the spectral norm of the weights between them is bounded by 0.9.
        feedback, feedback_angle (*optional*):
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
    ):
        super().__init__(
            hidden_size, hidden_features, num_heads, feedback=feedback, feedback_angle=feedback_angle,
            spectral_cap=SPECTRAL_CAP,
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Arguments that build heads of the same shape, as JSON can hold them."""
        return {
            "hidden_size": self.in_features,
            "num_heads": self.out_features,
            "hidden_features": self.hidden_features,
            "feedback": self.feedback,
            "feedback_angle": self.feedback_angle,
        }

    def initial_parameters(self, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """As [`EPHead.initial_parameters`], with a readout of zero."""
        values = super().initial_parameters(generator)
        return values | {"readout_weight": torch.zeros_like(values["readout_weight"])}

    def forward(self, hidden: torch.Tensor | None, **kwargs: object) -> torch.Tensor:  # type: ignore[override]
        """Values of shape `(B, T, num_heads)`, float32, from hidden states `(B, T, H)` of any floating dtype."""
        return super().forward(None if hidden is None else hidden.float(), **kwargs)  # type: ignore[arg-type]


def check_value_heads(
    hidden_features: Sequence[int], feedback: str, feedback_angle: float, homeostasis_coef: float, prefix: str = ""
) -> None:
    """
    Refuses settings of [`EPValueHeads`] and of the weight of their homeostasis objective that cannot be used; `prefix`
    is what their names begin with where the user gave them.
    """
    check_widths(f"{prefix}hidden_features", hidden_features)
    check_feedback(feedback, feedback_angle, prefix=prefix)
    check_homeostasis(homeostasis_coef, feedback, prefix=prefix)
