"""Metrics of a rollout and of the critic, averaged over all processes."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..equilibrium.head import EPHead
from .iterates import IterateStatistics
from .lagrangian import LagrangeMultipliers


Metrics = dict[str, list[float]]


def mean_divergences(divergence: torch.Tensor, mask: torch.Tensor, gather: Callable) -> tuple[float, float]:
    """
    Args:
        divergence (`torch.Tensor` of shape `(B, T)`):
            Estimate of the KL at each token, in nats.
        mask (`torch.Tensor` of shape `(B, T)`):
            Response tokens.
        gather (`Callable`):
            Gathers a tensor over processes along its first dimension.

    Returns:
        `tuple[float, float]`: mean for each token and for each response, over all processes, in nats.
    """
    rows = mask.new_tensor(len(mask)).float()
    sums = torch.stack([(divergence * mask).sum().float(), mask.sum().float(), rows])
    total, tokens, responses = gather(sums.unsqueeze(0)).sum(dim=0).tolist()
    return total / max(tokens, 1.0), total / responses


def record_violations(
    metrics: Metrics,
    names: Sequence[str],
    multipliers: LagrangeMultipliers,
    means: Sequence[float],
    statistics: IterateStatistics | None = None,
) -> None:
    """
    Records where the constraints stand.

    Args:
        metrics (`dict[str, list[float]]`):
            Metrics of the mode, added to.
        names (`Sequence[str]`):
            Name of the reward of each constraint.
        multipliers ([`LagrangeMultipliers`]):
            Multipliers.
        means (`Sequence[float]`):
            Mean of the reward of each constraint over the rollout or the evaluation batch.
        statistics ([`IterateStatistics`], *optional*):
            Running statistics; given in training, where the multipliers are recorded too.
    """
    weights, raw, saturated = multipliers.weights(), multipliers.values(), multipliers.saturated()
    for position, (name, constraint) in enumerate(zip(names, multipliers.constraints, strict=True)):
        violation = constraint.violation(means[position])
        scale = max(abs(float(constraint.threshold or 0.0)), 1e-8)
        metrics[f"violation/{name}"].append(violation)
        metrics[f"relative_violation/{name}"].append(violation / scale)
        if statistics is not None:
            metrics[f"multiplier/{name}"].append(float(raw[position]))
            metrics[f"weight/{name}"].append(float(weights[position]))
            metrics[f"saturation/{name}"].append(float(saturated[position]))
            metrics[f"oscillation/{name}"].append(statistics.oscillation(name))
            metrics[f"threshold/{name}"].append(float(constraint.threshold or 0.0))


def record_critic(
    metrics: Metrics,
    names: Sequence[str],
    values: torch.Tensor,
    returns: torch.Tensor,
    errors: torch.Tensor,
    mask: torch.Tensor,
    extra: torch.Tensor,
    gather: Callable,
) -> list[float]:
    """
    Records, for each stream, the value loss, mean value and mean return.

    Args:
        metrics (`dict[str, list[float]]`):
            Metrics of the mode, added to.
        names (`Sequence[str]`):
            Names of the K+1 streams.
        values (`torch.Tensor` of shape `(B, T, K+1)`):
            Values.
        returns (`torch.Tensor` of shape `(B, T, K+1)`):
            Their targets.
        errors (`torch.Tensor` of shape `(K+1,)`):
            Sum of the value loss over the tokens.
        mask (`torch.Tensor` of shape `(B, T)`):
            Response tokens.
        extra (`torch.Tensor` of shape `(E,)`):
            Other sums to carry in the same collective.
        gather (`Callable`):
            Gathers a tensor over processes along its first dimension.

    Returns:
        `list[float]` of length `E + 1`: `extra` summed over processes and, last, the number of tokens.
    """
    keep = mask.unsqueeze(-1)
    streams = torch.stack([errors, (values * keep).sum((0, 1)), (returns * keep).sum((0, 1))])
    local = torch.cat([streams.flatten(), extra, mask.sum().view(1)]).float()
    totals = gather(local.unsqueeze(0)).sum(dim=0)
    count = totals[-1].clamp(min=1.0)
    means = (totals[: streams.numel()] / count).view(3, -1).tolist()
    for index, name in enumerate(names):
        for metric, row in zip(("loss", "value", "return"), means, strict=True):
            metrics[f"critic/{name}/{metric}"].append(row[index])
    return totals[streams.numel() :].tolist()


def record_value_heads(metrics: Metrics, heads: nn.Module) -> None:
    """
    Records how equilibrium heads relaxed, and the asymmetry of their feedback. Nothing for other heads. All processes
    must call it.

    Args:
        metrics (`dict[str, list[float]]`):
            Metrics of the mode, added to.
        heads (`torch.nn.Module`):
            Value heads, sharded or not.
    """
    if not isinstance(heads, EPHead):
        return
    from ..equilibrium.report import gathered_asymmetry

    for name, value in heads.metrics().items():
        # A count so far, of which only the last is of interest
        metrics[name] = [value] if "num_" in name else [*metrics[name], value]
    if heads.feedback == "asymmetric":
        for name, value in gathered_asymmetry(heads).items():
            metrics[name].append(value)


def constant_rewards(names: Sequence[str], rewards: torch.Tensor) -> list[str]:
    """
    Names of the rewards that were the same for all completions, if there are several.

    Args:
        names (`Sequence[str]`):
            Names of the rewards.
        rewards (`torch.Tensor` of shape `(N, K)`):
            Rewards of a rollout.
    """
    same = (rewards == rewards[:1]).all(dim=0).tolist() if len(rewards) > 1 else []
    return [name for name, is_same in zip(names, same, strict=False) if is_same]
