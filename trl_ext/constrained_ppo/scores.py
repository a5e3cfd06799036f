"""Scores: the rewards as critic and policy are trained on them, in units that do not depend on the reward's.

    score = clip((r - m) / s, -c, c)        s, m: standard deviation and mean of the reward over all responses so far

A critic starts at zero and learns at a rate that knows nothing of the reward's size, a value may move by
`cliprange_value` a rollout, and `kl_coef` weighs nats against rewards: all three mean the same for a reward in [0, 1]
and one in thousands only if both are divided by their spread. Constraints, thresholds and logs keep the reward itself.
"""

from collections.abc import Sequence
from typing import Any

import torch


# A spread below this share of the mean's size is rounding: the reward is a constant
_ROUNDING = 1e-6


class ScoreScaling:
    """
    Turns rewards into scores, with moments that run over all rollouts.

    Args:
        names (`Sequence[str]`):
            Name of each reward, by which a checkpoint keeps its moments.
        scale (`bool`, *optional*, defaults to `True`):
            Whether to divide by the standard deviation.
        center (`bool`, *optional*, defaults to `False`):
            Whether to subtract the mean, too.
        clip (`float`, *optional*):
            Bound on the size of a score.
    """

    def __init__(self, names: Sequence[str], scale: bool = True, center: bool = False, clip: float | None = None):
        self.names, self.scale, self.center, self.clip = list(names), scale, center, clip
        self._count = 0
        self._means = torch.zeros(len(self.names), dtype=torch.float64)
        # Sums of squared deviations from the means
        self._squares = torch.zeros(len(self.names), dtype=torch.float64)

    def observe(self, rewards: torch.Tensor) -> None:
        """Takes in the rewards `(N, K)` of a rollout, of all processes."""
        rewards = rewards.detach().cpu().double()
        rows, means = len(rewards), rewards.mean(dim=0)
        shift, total = means - self._means, self._count + len(rewards)
        self._squares += (rewards - means).square().sum(dim=0) + shift.square() * self._count * rows / total
        self._means += shift * rows / total
        self._count = total

    def spreads(self) -> torch.Tensor:
        """Standard deviation of each reward so far, `(K,)`, float64; 0 for one that has been constant."""
        spreads = (self._squares / max(self._count, 1)).sqrt()
        return torch.where(spreads > _ROUNDING * self._means.abs(), spreads, 0.0)

    def __call__(self, rewards: torch.Tensor) -> torch.Tensor:
        """Scores `(N, K)` of rewards; a reward that has been constant so far says nothing and scores 0."""
        scores = rewards.cpu().double()
        if self.scale:
            spreads = self.spreads()
            scores = scores - self._means if self.center else scores
            scores = torch.where(spreads > 0, scores / spreads, 0.0)
        if self.clip is not None:
            scores = scores.clamp(-self.clip, self.clip)
        return scores.to(rewards)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """All that a resumed run needs, by name of the reward."""
        moments = zip(self.names, self._means.tolist(), self._squares.tolist(), strict=True)
        return {name: {"count": self._count, "mean": mean, "squares": squares} for name, mean, squares in moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`]; refuses one that lacks a reward."""
        missing = [name for name in self.names if name not in state]
        if missing:
            raise ValueError(
                f"The checkpoint has no moments of the rewards {missing}; it has those of {sorted(state)}. Resume "
                "with the rewards and the `use_score_scaling` of the saved run."
            )
        own = [state[name] for name in self.names]
        self._count = int(own[0]["count"]) if own else 0
        self._means = torch.tensor([moments["mean"] for moments in own], dtype=torch.float64)
        self._squares = torch.tensor([moments["squares"] for moments in own], dtype=torch.float64)


def value_clipranges(
    returns: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, cliprange: float, reduce: Any
) -> torch.Tensor:
    """
    Clipping range of the values in units of the spread of the returns, for each stream.

    The spread is `sqrt(mean((R - mean(V))^2))` over the response tokens of all processes: the standard deviation of
    the returns once the critic's mean is right, and the distance that the values have to go before.

    Args:
        returns (`torch.Tensor` of shape `(K+1, B, T)`):
            Targets of the values.
        values (`torch.Tensor` of shape `(B, T, K+1)`):
            Values at generation.
        mask (`torch.Tensor` of shape `(B, T)`, bool or integer):
            Response tokens.
        cliprange (`float`):
            Range in spreads.
        reduce (`Callable`):
            Sum of a tensor over processes.

    Returns:
        `torch.Tensor` of shape `(K+1,)`
    """
    inside = mask.to(returns.dtype)
    count = reduce(inside.sum()).clamp(min=1.0)
    means = reduce((values.movedim(-1, 0) * inside).sum(dim=(1, 2))) / count
    squares = reduce(((returns - means.view(-1, 1, 1)).square() * inside).sum(dim=(1, 2))) / count
    return cliprange * squares.sqrt()


def size_warning(sizes: torch.Tensor, names: Sequence[str], cliprange: float, far: float) -> str:
    """Names rewards whose root mean square `(K,)` a critic that starts at zero needs over `far` rollouts to reach."""
    found = {name: size for name, size in zip(names, sizes.tolist(), strict=True) if size > far * cliprange}
    stated = ", ".join(f"{name!r} ({size:.3g})" for name, size in found.items())
    return (
        f"Rewards are large for a critic that starts at zero: {stated} on average. A value moves by at most "
        f"`cliprange_value={cliprange:g}` a rollout, so that reaching it takes {max(found.values()) / cliprange:.0f} "
        "rollouts. Set `use_score_scaling=True` and `use_score_norm=True`, or `cliprange_value_unit='spread'`."
    )


def check_scores(args: Any) -> None:
    """Refuses settings of scores, and of the units of values and gradients, that contradict each other."""
    if args.use_score_norm and not args.use_score_scaling:
        raise ValueError("`use_score_norm=True` needs `use_score_scaling=True`. Set both, or leave it out.")
    if args.critic_max_grad_norm is not None and not args.max_grad_norm:
        raise ValueError(
            f"`critic_max_grad_norm={args.critic_max_grad_norm}` acts where gradients are clipped, and "
            f"`max_grad_norm={args.max_grad_norm}` clips none. Set that, to a large number for no bound on the "
            "policy's."
        )
