r"""Kinds of token masks without parameters: functions of what is known of each response token, in one table.

    activation    mean over groups of the reference's activations, each rescaled to [0, 1] (the paper's MaPO)
    given         numbers that come with the data (given_weights.py)
    confidence    1 where p(y_t) < the response's mean of p(y_t), else 0, with the policy's p (ConfPO)
    log_ratio     exp(+-clamp(log p(y_t) - log p_ref(y_t), -0.5, 1.5)), + on chosen and - on rejected responses
                  (TIS-DPO's weights, with policy and reference as the pair of models)

[`register_mask_kind`] adds one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .reference_pass import ReferenceStates


@dataclass
class TokenInputs:
    """
    What a mask may be a function of. Every tensor has shape `(2B, T-1)`, chosen rows first, and no gradient; column
    `t` tells of token `t + 1`.

    Attributes:
        predicted (`torch.Tensor`, bool):
            Which columns are response tokens. All else is zero outside them.
        states ([`ReferenceStates`]):
            States of the reference model, as far as the kind reads them.
        labels (`torch.Tensor`, int64, *optional*):
            The tokens, `-100` outside the completion.
        policy_log_probs (`torch.Tensor`, float32, *optional*):
            Their log-probabilities under the policy, in nats.
        reference_log_probs (`torch.Tensor`, float32, *optional*):
            Their log-probabilities under the reference model, in nats.
        divergences (`torch.Tensor`, float32, *optional*):
            KL(reference || policy) of the next-token distributions, in nats.
        entropy (`torch.Tensor`, float32, *optional*):
            Entropy of the policy's next-token distribution, in nats.
        given (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            Weights for rewards and divergences that came with the data, float32.
    """

    predicted: torch.Tensor
    states: ReferenceStates
    labels: torch.Tensor | None = None
    policy_log_probs: torch.Tensor | None = None
    reference_log_probs: torch.Tensor | None = None
    divergences: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    given: tuple[torch.Tensor, torch.Tensor] | None = None


# One mask for both terms, or one for the rewards and one for the divergences
MaskFunction = Callable[[TokenInputs], torch.Tensor | tuple[torch.Tensor, torch.Tensor]]


class MaskKind(NamedTuple):
    """
    An entry of the table.

    Attributes:
        function (`Callable`):
            From [`TokenInputs`] to weights `(2B, T-1)`, float32 and not negative, or to a pair of them.
        reads (`str`):
            What it reads of the reference model's states: `"activation"` maps, the layers' states (`"learned"`), or
            nothing (`"ones"`).
    """

    function: MaskFunction
    reads: str = "ones"


class ActivationTokenMask:
    """
    Mask read off the reference model's activations, the paper's MaPO, without parameters.

    Each hooked activation, reduced to its mean over the features, is one map of scalars over the tokens. A map is
    rescaled in each sequence to `[0, 1]` over the response tokens; maps are averaged in their group (MLP, attention,
    residual stream, logits), and the groups are averaged.
    """

    def __call__(self, maps: dict[str, list[torch.Tensor]], completion_mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            maps (`dict[str, list[torch.Tensor]]`):
                For each group, maps of shape `(2B, T-1)`.
            completion_mask (`torch.Tensor` of shape `(2B, T-1)`, bool):
                Response tokens.

        Returns:
            `torch.Tensor` of shape `(2B, T-1)`, float32, in `[0, 1]`, zero outside the completion.
        """
        groups = [
            torch.stack([rescale_to_unit(values, completion_mask) for values in group]).mean(dim=0)
            for group in maps.values()
        ]
        return torch.stack(groups).mean(dim=0)


def rescale_to_unit(values: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """
    Min-max rescaling over the response tokens of each sequence. A z-norm before it, as the paper has, changes nothing.

    A sequence whose values are all equal, such as a response of one token, says nothing about its tokens and gets
    weights of one.

    Args:
        values (`torch.Tensor` of shape `(2B, T-1)`):
            One scalar for each token.
        completion_mask (`torch.Tensor` of shape `(2B, T-1)`, bool):
            Response tokens.

    Returns:
        `torch.Tensor` of shape `(2B, T-1)`, float32, zero outside the completion.
    """
    values = values.float()
    lowest = values.masked_fill(~completion_mask, torch.inf).amin(dim=1, keepdim=True)
    highest = values.masked_fill(~completion_mask, -torch.inf).amax(dim=1, keepdim=True)
    spread = highest - lowest
    rescaled = torch.where(spread > 0, (values - lowest) / spread.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    return rescaled.masked_fill(~completion_mask, 0.0)


def activation_weights(tokens: TokenInputs) -> torch.Tensor:
    """The paper's MaPO ([`ActivationTokenMask`])."""
    if tokens.states.activation_maps is None:
        raise ValueError("`states` has no activation maps: read them with `mask_type='activation'`.")
    return ActivationTokenMask()(tokens.states.activation_maps, tokens.predicted)


def given_weights(tokens: TokenInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights that came with the data, for rewards and divergences."""
    if tokens.given is None:
        raise ValueError("`mask_type='given'` has no weights here: they come with a trainer's batches.")
    return tokens.given


def confidence_weights(tokens: TokenInputs) -> torch.Tensor:
    """
    ConfPO's selection (https://huggingface.co/papers/2506.08712): one for tokens to which the policy gives less than
    the arithmetic mean of its probabilities in the response, zero for the others.
    """
    assert tokens.policy_log_probs is not None
    probabilities = tokens.policy_log_probs.exp() * tokens.predicted
    mean = probabilities.sum(dim=1, keepdim=True) / tokens.predicted.sum(dim=1, keepdim=True).clamp_min(1)
    return (probabilities < mean).float()


def log_ratio_weights(
    tokens: TokenInputs, scale: float = 1.0, lowest: float = -0.5, highest: float = 1.5
) -> torch.Tensor:
    """
    Weights in the form of TIS-DPO's (https://huggingface.co/papers/2410.04350),
    `exp(mu * clamp(r_t, lowest, highest))` with `mu = scale` on chosen and `-scale` on rejected responses. There `r_t`
    is the log-ratio of two models contrasted for the purpose; here it is that of policy and reference, DPO's implicit
    reward. The three constants have not been checked against the paper's text, which was not at hand; its released
    code, by another implementation's account, maps the ranks of `r_t` in a response to `[0.7, 1.3]` in their place.
    """
    assert tokens.policy_log_probs is not None and tokens.reference_log_probs is not None
    clamped = (tokens.policy_log_probs - tokens.reference_log_probs).clamp(lowest, highest)
    chosen, rejected = clamped.chunk(2)
    return torch.exp(scale * torch.cat([chosen, -rejected]))


MASK_KINDS: dict[str, MaskKind] = {
    "activation": MaskKind(activation_weights, reads="activation"),
    "given": MaskKind(given_weights),
    "confidence": MaskKind(confidence_weights),
    "log_ratio": MaskKind(log_ratio_weights),
}


def register_mask_kind(name: str, function: MaskFunction, reads: str = "ones") -> None:
    """
    Makes `mask_type=name` valid in configurations of this process.

    Args:
        name (`str`):
            Name of the kind.
        function (`Callable`):
            From [`TokenInputs`] to weights `(2B, T-1)`, float32 and not negative, or to one for the rewards and one
            for the divergences. Runs without gradient; what it says outside the completion is ignored.
        reads (`str`, *optional*, defaults to `"ones"`):
            What it reads of the reference model's states: `"activation"` maps, the layers' states (`"learned"`), or
            nothing.

    Raises:
        ValueError: If the name is taken or `reads` unknown.

    Example:

    ```python
    from trl_ext import SparsePOConfig
    from trl_ext.sparse_po.mask_kinds import register_mask_kind

    def uncertain_tokens(tokens):
        return tokens.entropy / tokens.entropy.amax(dim=1, keepdim=True)

    register_mask_kind("entropy", uncertain_tokens)
    args = SparsePOConfig(mask_type="entropy")
    ```
    """
    if name in ("learned", "ones", *MASK_KINDS):
        raise ValueError(f"There is a mask kind {name!r} already. Choose another name.")
    if reads not in ("ones", "learned", "activation"):
        raise ValueError(f"`reads` must be 'ones', 'learned' or 'activation', got {reads!r}.")
    MASK_KINDS[name] = MaskKind(function, reads)


@torch.no_grad()
def kind_weights(name: str, tokens: TokenInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Weights of a kind of the table.

    Args:
        name (`str`):
            Name of the kind.
        tokens ([`TokenInputs`]):
            What it is a function of.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: reward mask and divergence mask, each `(2B, T-1)` float32, zero outside
        the completion.

    Raises:
        ValueError: If the function returns another shape.
    """
    found = MASK_KINDS[name].function(tokens)
    pair = found if isinstance(found, tuple) else (found, found)
    shape = tokens.predicted.shape
    if len(pair) != 2 or any(weights.shape != shape for weights in pair):
        raise ValueError(
            f"The mask kind {name!r} returned shapes {[tuple(weights.shape) for weights in pair]}, expected one "
            f"tensor of shape {tuple(shape)}, or two for rewards and divergences."
        )
    reward, divergence = (weights.float().masked_fill(~tokens.predicted, 0.0) for weights in pair)
    return reward, divergence
