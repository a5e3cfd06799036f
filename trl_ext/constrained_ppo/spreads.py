"""Standard deviations over responses, in which violations and reward advantages are measured."""

from collections.abc import Sequence
from typing import Any

import torch


# A spread below this share of the mean's size is rounding: the signal is a constant
_ROUNDING = 1e-6


class SignalSpreads:
    """
    The spread of each signal over responses: given, or that of the first samples with any, which may then be tracked.

    Args:
        names (`Sequence[str]`):
            Name of each signal, by which a checkpoint keeps its spread.
        given (`Sequence[float | None]`):
            Spreads that stay as they are.
        ema (`float`, *optional*, defaults to `0.0`):
            Decay of the exponential moving average of variances over rollouts; 0 keeps the first spread.
    """

    def __init__(self, names: Sequence[str], given: Sequence[float | None], ema: float = 0.0):
        self.names, self.ema = list(names), ema
        self._is_given = torch.tensor([spread is not None for spread in given])
        # 0 where not known yet
        self._spreads = torch.tensor([spread or 0.0 for spread in given], dtype=torch.float64)

    def observe(self, signals: torch.Tensor) -> None:
        """Takes in the signals `(N, S)` of a rollout, or of samples of the policy before training."""
        signals = signals.double().cpu()
        found = signals.std(dim=0, unbiased=False)
        found = torch.where(found > _ROUNDING * signals.mean(dim=0).abs(), found, 0.0)
        is_known = self._spreads > 0
        tracked = (self.ema * self._spreads.square() + (1 - self.ema) * found.square()).sqrt()
        # A rollout without any spread says nothing of the scale
        kept = tracked if self.ema else self._spreads
        updated = torch.where(is_known, torch.where(found > 0, kept, self._spreads), found)
        self._spreads = torch.where(self._is_given, self._spreads, updated)

    def values(self) -> torch.Tensor:
        """The spreads `(S,)`, float64, 1 where none is known yet."""
        return torch.where(self._spreads > 0, self._spreads, 1.0)

    def state_dict(self) -> dict[str, float]:
        """All that a resumed run needs, by name; 0 where not known."""
        return dict(zip(self.names, self._spreads.tolist(), strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`]; a signal that it lacks keeps its spread."""
        current = self.state_dict()
        self._spreads = torch.tensor([state.get(name, current[name]) for name in self.names], dtype=torch.float64)


def standard_errors(signals: torch.Tensor, spreads: torch.Tensor, num_generations: int = 1) -> torch.Tensor:
    """
    Standard errors of the means of a rollout's signals, `(S,)`, float64.

    Responses to one prompt are not independent, so the deviation is that of the means of prompts and their number is
    what counts. A rollout may by chance show no spread at all: half of `spreads` is the least deviation.

    Args:
        signals (`torch.Tensor` of shape `(N, S)`):
            Signals of all responses, those of one prompt next to each other.
        spreads (`torch.Tensor` of shape `(S,)`):
            Standard deviations of the signals over responses.
        num_generations (`int`, *optional*, defaults to `1`):
            Responses of each prompt.

    Returns:
        `torch.Tensor`
    """
    means = signals.double().cpu().view(-1, num_generations, signals.size(1)).mean(dim=1)
    least = 0.5 * spreads / num_generations**0.5
    return torch.maximum(means.std(dim=0, unbiased=False), least) / len(means) ** 0.5
