r"""Token masks of SparsePO: from states of the reference model to one weight for each response token.

    learned      m(y_t) = ReLU(sum_l c_l * ReLU(w_l . LN(h_l) + b_l)), a sum over the layers `l` of the reference model
    activation   the mean over groups of activations, each rescaled to [0, 1] over the response
    ones         m(y_t) = 1

The weight of token `y_t` is computed from the states `h_l` at position `t - 1`, which predict it, never from `y_t`
itself. [`TokenMasks`] holds what a setting uses, and [`TokenMaskCompanion`] keeps it beside the policy.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..core.companion import Companion, read_companion
from .reference_pass import ReferenceStates


MaskInit = Literal["positive", "paper"]
TOKEN_MASKS = "token_masks"
TOKEN_MASKS_FILE = "token_masks.safetensors"
# The official code's masks are linear layers under transformers' `_init_weights`
PAPER_STANDARD_DEVIATION = 0.02
# Of a score `w . x` of standardized states: half the bias of one, so that few scores start below zero
SCORE_STANDARD_DEVIATION = 0.5


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
            nn.init.normal_(self.layer_weight, std=SCORE_STANDARD_DEVIATION / hidden_size**0.5, generator=generator)
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
            scores = torch.bmm(states.float(), weight.unsqueeze(-1)).squeeze(-1) + bias.unsqueeze(-1)  # (L, N)
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


class TokenMasks(nn.Module):
    """
    The learned masks that a setting uses, and the rule by which they weight the two terms.

    A mask that no term uses is not built, so no engine sees a parameter without gradient.

    Args:
        num_layers (`int`):
            Layers of the reference model.
        hidden_size (`int`):
            Size of its hidden states.
        mask_type (`str`, *optional*, defaults to `"learned"`):
            `"learned"`, `"activation"` or `"ones"`.
        independent (`bool`, *optional*, defaults to `False`):
            Whether rewards and divergences have masks of their own.
        mask_reward (`bool`, *optional*, defaults to `True`):
            Whether log-ratios are masked.
        mask_divergence (`bool`, *optional*, defaults to `True`):
            Whether divergences are masked.
        init (`str`, *optional*, defaults to `"positive"`):
            Initialisation of [`LearnedTokenMask`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the masks' random weights, so that every process draws the same.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        mask_type: str = "learned",
        independent: bool = False,
        mask_reward: bool = True,
        mask_divergence: bool = True,
        init: MaskInit = "positive",
        seed: int = 0,
    ):
        super().__init__()
        self.mask_type = mask_type
        self.masks_reward = mask_type != "ones" and mask_reward
        self.masks_divergence = mask_type != "ones" and mask_divergence
        self.independent = independent
        names = ["common"]
        if independent:
            names = ["reward"] * self.masks_reward + ["divergence"] * self.masks_divergence
        if mask_type != "learned":
            names = []
        generator = torch.Generator().manual_seed(seed)
        self.learned = nn.ModuleDict(
            {name: LearnedTokenMask(num_layers, hidden_size, init, generator) for name in names}
        )

    @property
    def is_common(self) -> bool:
        """Whether one learned mask weights both terms."""
        return self.mask_type == "learned" and not self.independent and self.masks_reward and self.masks_divergence

    def forward(self, states: ReferenceStates, predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            states ([`ReferenceStates`]):
                States of the reference model.
            predicted (`torch.Tensor` of shape `(2B, T-1)`, bool):
                Positions that predict a response token.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: reward mask and divergence mask, each `(2B, T-1)` float32, zero
            outside the completion.
        """
        ones = predicted.float()
        weights: dict[str, torch.Tensor]
        if self.mask_type == "activation":
            if states.activation_maps is None:
                raise ValueError("`states` has no activation maps: read them with `mask_type='activation'`.")
            weights = {"common": ActivationTokenMask()(states.activation_maps, predicted)}
        else:
            weights = {
                name: scatter_tokens(mask(states.layer_states), predicted) for name, mask in self.learned.items()
            }
        reward_name, divergence_name = ("reward", "divergence") if self.independent else ("common", "common")
        reward_mask = weights[reward_name] if self.masks_reward else ones
        divergence_mask = weights[divergence_name] if self.masks_divergence else ones
        return reward_mask, divergence_mask


def scatter_tokens(values: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Puts `(N,)` values of the response tokens at their places in `(2B, T-1)`, zero elsewhere, with gradient."""
    return values.new_zeros(predicted.shape).masked_scatter(predicted, values)


class TokenMaskCompanion(Companion):
    """
    Token masks as a companion of the policy: matrices decay, and the file says what kind of masks it holds.

    Args:
        masks ([`TokenMasks`]):
            Masks.
        learning_rate (`float`, *optional*):
            Their learning rate. Defaults to the policy's.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Decoupled weight decay of the matrices; LayerNorm and biases have none.
    """

    module: TokenMasks

    def __init__(self, masks: TokenMasks, learning_rate: float | None = None, weight_decay: float = 0.0):
        super().__init__(TOKEN_MASKS, masks, TOKEN_MASKS_FILE, "learned masks", learning_rate)
        self.weight_decay = weight_decay

    @property
    def kept(self) -> nn.Module:
        return self.module.learned

    def metadata(self) -> dict[str, str]:
        settings = {
            "mask_type": self.module.mask_type,
            "independent_masks": self.module.independent,
            "mask_reward": self.module.masks_reward,
            "mask_divergence": self.module.masks_divergence,
        }
        return {name: str(value) for name, value in settings.items()} | {"format": "pt"}

    def parameter_groups(
        self, named: Iterable[tuple[str, nn.Parameter]]
    ) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        masks = [module for module in self.module.learned.values() if isinstance(module, LearnedTokenMask)]
        matrices = {id(parameter) for mask in masks for parameter in mask.decayed_parameters()}
        parameters = [parameter for _, parameter in named]
        decayed = [parameter for parameter in parameters if id(parameter) in matrices]
        return [(decayed, self.weight_decay), ([p for p in parameters if id(p) not in matrices], 0.0)]


def restore_masks(folder: str | Path) -> TokenMasks:
    """
    Builds the masks that a finished run saved, to study them.

    Args:
        folder (`str` or `Path`):
            Folder with `token_masks.safetensors`.

    Returns:
        [`TokenMasks`]

    Raises:
        FileNotFoundError: If the file is missing.
    """
    path = Path(folder) / TOKEN_MASKS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {TOKEN_MASKS_FILE}. Give the folder of a run with learned masks.")
    state, settings = read_companion(path)
    num_layers, hidden_size = next(tensor.shape for name, tensor in state.items() if name.endswith("layer_weight"))
    masks = TokenMasks(
        num_layers,
        hidden_size,
        settings["mask_type"],
        independent=settings["independent_masks"] == "True",
        mask_reward=settings["mask_reward"] == "True",
        mask_divergence=settings["mask_divergence"] == "True",
    )
    masks.learned.load_state_dict(state)
    return masks.eval()
