"""
Multipliers on drawn bandits whose saddle points are known: does every constraint settle where it should?

Each problem has a softmax policy over six arms, one to three constraints of drawn kinds, rewards with noise whose
scales differ a thousandfold, and thresholds that some policy meets, or, in one problem of eight, none. The policy
follows the exact natural gradient of the mixed advantage; the multipliers see means of sampled rewards. Multipliers
and mixtures are those of the trainer.

python -m recipes.experiments.constraint_bandits.run
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trl_ext.constrained_ppo.adaptation import FeasibilityWatch, standard_errors
from trl_ext.constrained_ppo.advantages import mix_advantages, mix_normalized
from trl_ext.constrained_ppo.constrained_ppo_config import PRESETS
from trl_ext.constrained_ppo.constraints import KINDS, Constraint
from trl_ext.constrained_ppo.multipliers import LagrangeMultipliers

from ..runner import markdown_table


NUM_ARMS = 6
NUM_REWARDS = 3
KL_COEF = 0.2
# Noise of a reward beside its spread over arms
NOISE = 0.3
_LEAST_LOG_PROBABILITY = -30.0


@dataclass
class Bandits:
    """P drawn problems; all tensors float64."""

    base: torch.Tensor  # (P, A), log-probabilities of the reference
    rewards: torch.Tensor  # (P, K, A), means of the arms
    noise: torch.Tensor  # (P, K), its standard deviation
    spreads: torch.Tensor  # (P, K), of a reward over episodes of the reference
    thresholds: torch.Tensor  # (P, K)
    kinds: torch.Tensor  # (P, K), indices of `KINDS`
    is_active: torch.Tensor  # (P, K), whether the reward is constrained
    is_feasible: torch.Tensor  # (P,)

    @property
    def signs(self) -> torch.Tensor:
        return torch.where(self.kinds == KINDS.index("<="), -1.0, 1.0).double()

    def means(self, log_policy: torch.Tensor) -> torch.Tensor:
        """Mean of each reward, `(P, K)`."""
        return torch.einsum("pka,pa->pk", self.rewards, log_policy.exp())

    def sample(self, log_policy: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
        """Rewards of `count` episodes, `(P, K, count)`."""
        arms = torch.multinomial(log_policy.exp(), count, replacement=True, generator=generator)
        found = self.rewards.gather(2, arms.unsqueeze(1).expand(-1, NUM_REWARDS, -1))
        noise = torch.randn(found.shape, generator=generator, dtype=torch.float64)
        return found + self.noise.unsqueeze(-1) * noise

    def divergence(self, log_policy: torch.Tensor) -> torch.Tensor:
        """KL from the reference, `(P,)`, in nats."""
        return (log_policy.exp() * (log_policy - self.base)).sum(dim=-1)

    def saddle(self, steps: int = 3000, rate: float = 0.25) -> torch.Tensor:
        """Log-probabilities at the saddle point, `(P, A)`: ascent on the dual, whose policy tilts the reference."""
        centered = (self.rewards - self.means(self.base).unsqueeze(-1)) / self.spreads.unsqueeze(-1)
        signed = self.signs.unsqueeze(-1) * centered
        wanted = self.signs * (self.thresholds - self.means(self.base)) / self.spreads
        multipliers = torch.zeros_like(wanted)
        for _ in range(steps):
            policy = (self.base + torch.einsum("pk,pka->pa", multipliers, signed)).log_softmax(-1)
            reached = torch.einsum("pka,pa->pk", signed, policy.exp())
            multipliers = multipliers + rate * (wanted - reached) * self.is_active
            multipliers = torch.where(self.kinds == KINDS.index("=="), multipliers, multipliers.clamp_min(0.0))
        return policy


def draw(count: int, seed: int = 0) -> Bandits:
    """Problems with thresholds that a drawn tilt of the reference meets; every eighth has one beyond the best arm."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = (0.5 * normal(count, NUM_ARMS)).log_softmax(-1)
    scales = 10 ** (3 * torch.rand(count, NUM_REWARDS, 1, generator=generator, dtype=torch.float64) - 1.5)
    rewards = scales * normal(count, NUM_REWARDS, NUM_ARMS)
    means = torch.einsum("pka,pa->pk", rewards, base.exp()).unsqueeze(-1)
    over_arms = torch.einsum("pka,pa->pk", (rewards - means).square(), base.exp()).sqrt()
    is_active = torch.arange(NUM_REWARDS) < torch.randint(1, 4, (count, 1), generator=generator)
    tilts = normal(count, NUM_REWARDS) * is_active / over_arms
    tilted = (base + torch.einsum("pk,pka->pa", tilts, rewards - means)).log_softmax(-1)
    thresholds = torch.einsum("pka,pa->pk", rewards, tilted.exp())
    kinds = torch.randint(0, 3, (count, NUM_REWARDS), generator=generator)
    is_feasible = torch.arange(count) % 8 != 0
    beyond = rewards.amax(dim=-1) + 0.3 * over_arms
    thresholds[:, 0] = torch.where(is_feasible, thresholds[:, 0], beyond[:, 0])
    kinds[:, 0] = torch.where(is_feasible, kinds[:, 0], KINDS.index(">="))
    spreads = over_arms * math.sqrt(1 + NOISE**2)
    return Bandits(base, rewards, NOISE * over_arms, spreads, thresholds, kinds, is_active, is_feasible)


@dataclass
class Played:
    """What a run leaves: of the last third means and standard deviations of the rewards, and what the log named."""

    means: torch.Tensor  # (P, K)
    swings: torch.Tensor  # (P, K)
    divergences: torch.Tensor  # (P,), mean KL from the reference, in nats
    named: set[int]  # Flat indices of constraints, `K * problem + reward`


def play(
    bandits: Bandits,
    method: str = "mu",
    whitening: str | None = None,
    mixing: str | None = None,
    rollouts: int = 600,
    episodes: int = 64,
    rate: float = 0.2,
    seed: int = 1,
) -> Played:
    """
    Runs all problems at once under the settings of a method's preset.

    Args:
        bandits ([`Bandits`]):
            The problems.
        method (`str`, *optional*, defaults to `"mu"`):
            Preset; the kinds are the problems' own.
        whitening (`str`, *optional*):
            In place of the preset's.
        mixing (`str`, *optional*):
            In place of the preset's.
        rollouts (`int`, *optional*, defaults to `600`):
            Updates.
        episodes (`int`, *optional*, defaults to `64`):
            Episodes of each.
        rate (`float`, *optional*, defaults to `0.2`):
            Step of the policy along the natural gradient.
        seed (`int`, *optional*, defaults to `1`):
            Seed of the samples.

    Returns:
        [`Played`]
    """
    preset, generator = PRESETS[method], torch.Generator().manual_seed(seed)
    whitening, mix = whitening or preset.whitening, mixing or preset.mixing
    active = bandits.is_active.flatten().nonzero().flatten().tolist()
    constraints = [
        Constraint(index, float(bandits.thresholds.flatten()[index]), KINDS[int(bandits.kinds.flatten()[index])])
        for index in active
    ]
    multipliers = LagrangeMultipliers(
        constraints, preset.squash, preset.learning_rate, preset.momentum, preset.proportional,
        maximum=preset.maximum, drift=preset.drift, anti_windup=preset.anti_windup,
    )  # fmt: skip
    spreads = bandits.sample(bandits.base, 64, generator).std(dim=-1, unbiased=False)
    if preset.units == "spread":
        multipliers.set_spreads(spreads.flatten()[active])
    watches = [FeasibilityWatch() for _ in active]
    policy, weights, kept, named = bandits.base, torch.zeros(bandits.spreads.numel()).double(), [], set()
    divergences = []
    for rollout in range(rollouts):
        sampled = bandits.sample(policy, episodes, generator).movedim(-1, 0).flatten(1)
        errors = standard_errors(sampled, spreads.flatten())
        weights[active] = multipliers.update(sampled.mean(dim=0)[active], errors[active])
        seen = zip(active, watches, multipliers.exhausted(), multipliers.violations().abs().tolist(), strict=True)
        for index, watch, is_exhausted, violation in seen:
            if watch.check("", is_exhausted, violation):
                named.add(index)
        advantages = _mixed(bandits, policy, weights.view_as(spreads), spreads, whitening, mix)
        # An arm stays drawable, whose log-ratio would else become infinite
        policy = (policy + rate * advantages).log_softmax(-1).clamp_min(_LEAST_LOG_PROBABILITY).log_softmax(-1)
        if rollout >= rollouts * 2 // 3:
            kept.append(bandits.means(policy))
            divergences.append(bandits.divergence(policy))
    means = torch.stack(kept)
    return Played(means.mean(dim=0), means.std(dim=0), torch.stack(divergences).mean(dim=0), named)


def _mixed(
    bandits: Bandits, policy: torch.Tensor, weights: torch.Tensor, spreads: torch.Tensor, whitening: str, mix: str
) -> torch.Tensor:
    """Mixed advantage of each arm, `(P, A)`."""
    kl = -KL_COEF * (policy - bandits.base)
    streams = bandits.signs.unsqueeze(-1) * bandits.rewards
    if whitening == "spread":
        streams = streams / spreads.unsqueeze(-1)
    if whitening == "streams":
        kl, streams = _white(kl, policy), _white(streams, policy.unsqueeze(1))
    function: Callable[..., torch.Tensor] = mix_normalized if mix == "normalized" else mix_advantages
    found, mask = torch.empty_like(kl), torch.ones(1, NUM_ARMS)
    counts = bandits.is_active.sum(dim=-1)
    for count in counts.unique().tolist():
        own = counts == count
        # The constrained rewards are the first; an arm stands for a token
        arguments = kl[own].unsqueeze(1), streams[own][:, :count].unsqueeze(2), weights[own][:, :count]
        found[own] = torch.vmap(lambda *streams: function(*streams, mask, False))(*arguments).squeeze(1)
    return _white(found, policy) if whitening == "mixture" else found


def _white(values: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    """Mean zero and deviation one under the policy."""
    probabilities = policy.exp()
    centered = values - (values * probabilities).sum(-1, keepdim=True)
    deviation = (centered.square() * probabilities).sum(-1, keepdim=True).sqrt()
    return centered / (deviation + 1e-8)


def misses(bandits: Bandits, found: Played, saddle: torch.Tensor, episodes: int = 64) -> tuple[torch.Tensor, ...]:
    """Of constraints that can be met, `(M,)`: distance from the saddle and swing, in standard errors of a rollout."""
    kept = bandits.is_active & bandits.is_feasible.unsqueeze(-1)
    errors = bandits.spreads / math.sqrt(episodes)
    return ((found.means - bandits.means(saddle)) / errors).abs()[kept], (found.swings / errors)[kept]


def main(count: int) -> None:
    """Prints how near each form comes to the saddle points."""
    bandits = draw(count)
    saddle, rows = bandits.saddle(), []
    infeasible = {NUM_REWARDS * index for index in (~bandits.is_feasible).nonzero().flatten().tolist()}
    forms: dict[str, dict[str, Any]] = {
        "new default": {},
        "new default, streams whitened": {"whitening": "streams"},
        "new default, mixture whitened": {"whitening": "mixture"},
        "the paper's mixing, spread": {"mixing": "paper"},
        "the paper's form, tanh": {"method": "xi-paper"},
    }
    for name, settings in forms.items():
        found = play(bandits, **settings)
        distances, swings = misses(bandits, found, saddle)
        excess = (found.divergences - bandits.divergence(saddle))[bandits.is_feasible]
        hit = (distances < 2) & (swings < 2)
        rows.append(
            [
                name,
                f"{hit.double().mean():.1%}",
                f"{distances.median():.2f}",
                f"{distances.quantile(0.95):.2f}",
                f"{swings.median():.2f}",
                f"{swings.quantile(0.95):.2f}",
                f"{excess.median():+.3f}",
                f"{excess.quantile(0.95):+.3f}",
                f"{len(found.named & infeasible)} of {len(infeasible)}",
                str(len(found.named - infeasible)),
            ]
        )
    columns = ["form", "held", "distance", "95%", "swing", "95%", "KL", "95%", "infeasible named", "others named"]
    print(markdown_table(columns, rows))  # noqa: T201


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="Problems.")
    main(parser.parse_args().count)
