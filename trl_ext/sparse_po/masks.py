"""Token masks of SparsePO: from states of the reference model to one weight for each response token.

The weight of token `y_t` is computed from the states at position `t - 1`, which predict it, never from `y_t` itself.
"""

from typing import Literal

import torch
from torch import nn


MaskInit = Literal["positive", "paper"]
PAPER_STANDARD_DEVIATION = 0.02


def standardize(hidden: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """
    Subtracts the mean over the features and divides by the standard deviation: a LayerNorm before its scale and shift.

    Args:
        hidden (`torch.Tensor` of shape `(..., H)`, any floating dtype):
            Hidden states.
        eps (`float`, *optional*, defaults to `1e-5`):
            Added to the variance.

    Returns:
        `torch.Tensor` of shape `(..., H)` in the dtype of `hidden`, computed in float32.
    """
    return nn.functional.layer_norm(hidden.float(), hidden.shape[-1:], eps=eps).to(hidden.dtype)


class LearnedTokenMask(nn.Module):
    """
    Learned mask of the paper: for each layer `l` of the reference model, `s_l = ReLU(w_l . LN(h_l) + b_l)` with one
    LayerNorm shared by the layers, and `m = ReLU(sum_l c_l s_l)`.

    The mask is not bounded above; its zeros come from the two ReLUs.

    Args:
        num_layers (`int`):
            Number of layers `L` of the reference model.
        hidden_size (`int`):
            Size `H` of its hidden states.
        init (`str`, *optional*, defaults to `"positive"`):
            `"positive"` starts every weight near one (`b_l = 1`, `c_l = 1/L`, `w_l` of standard deviation
            `0.5/sqrt(H)`), so training starts near the unmasked loss and no mask starts dead. `"paper"` is the
            official code's: all weights from `N(0, 0.02^2)`, biases zero.
        generator (`torch.Generator`, *optional*):
            Source of the random weights.

    Raises:
        ValueError: If `init` is unknown or a size is not positive.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        init: MaskInit = "positive",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if num_layers < 1 or hidden_size < 1:
            raise ValueError(
                f"`num_layers` and `hidden_size` must be at least 1, got {num_layers} and {hidden_size}. Take both "
                "from the reference model's config."
            )
        if init not in ("positive", "paper"):
            raise ValueError(f"`mask_init` must be 'positive' or 'paper', got {init!r}.")
        self.norm_weight = nn.Parameter(torch.ones(hidden_size))
        self.norm_bias = nn.Parameter(torch.zeros(hidden_size))
        self.layer_weight = nn.Parameter(torch.empty(num_layers, hidden_size))
        self.layer_bias = nn.Parameter(torch.empty(num_layers))
        self.mixer_weight = nn.Parameter(torch.empty(num_layers))
        self.reset_parameters(init, generator)

    @torch.no_grad()
    def reset_parameters(self, init: MaskInit, generator: torch.Generator | None = None) -> None:
        """Draws fresh weights as `init` says (see the class)."""
        num_layers, hidden_size = self.layer_weight.shape
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        if init == "paper":
            nn.init.normal_(self.layer_weight, std=PAPER_STANDARD_DEVIATION, generator=generator)
            nn.init.normal_(self.mixer_weight, std=PAPER_STANDARD_DEVIATION, generator=generator)
            nn.init.zeros_(self.layer_bias)
        else:
            nn.init.normal_(self.layer_weight, std=0.5 / hidden_size**0.5, generator=generator)
            nn.init.ones_(self.layer_bias)
            nn.init.constant_(self.mixer_weight, 1.0 / num_layers)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor` of shape `(L, N, H)`, any floating dtype):
                Standardized states ([`standardize`]) of the reference model's layers at the positions that predict the
                N response tokens.

        Returns:
            `torch.Tensor` of shape `(N,)`, float32: the weights, not negative.
        """
        with torch.autocast(states.device.type, enabled=False):
            # w . (x * g + b) = (w * g) . x + w . b: the LayerNorm's scale and shift act on (L, H), not on (L, N, H)
            weight = self.layer_weight.float() * self.norm_weight.float()
            bias = self.layer_weight.float() @ self.norm_bias.float() + self.layer_bias.float()
            scores = torch.bmm(states.float(), weight.unsqueeze(-1)).squeeze(-1) + bias.unsqueeze(-1)
            return torch.relu(self.mixer_weight.float() @ torch.relu(scores))

    def decayed_parameters(self) -> list[nn.Parameter]:
        """Parameters that weight decay applies to: the matrices, not the LayerNorm nor the biases."""
        return [self.layer_weight, self.mixer_weight]


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
