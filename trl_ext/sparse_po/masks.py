r"""Token masks of SparsePO: from states of the reference model to one weight for each response token.

    learned      m(y_t) = ReLU(sum_l c_l * ReLU(w_l . LN(h_l) + b_l)), a sum over the layers `l` of the reference model
    ones         m(y_t) = 1
    others       functions without parameters, in the table of mask_kinds.py: "activation" is the paper's MaPO

The weight of token `y_t` is computed from the states `h_l` at position `t - 1`, which predict it, never from `y_t`
itself. [`TokenMasks`] holds what a setting uses, and [`TokenMaskCompanion`] keeps it beside the policy.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..core.companion import Companion, read_companion
from .mask_kinds import MASK_KINDS, TokenInputs, kind_weights
from .mask_kinds import ActivationTokenMask as ActivationTokenMask
from .mask_kinds import rescale_to_unit as rescale_to_unit
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
            `"learned"`, `"ones"` or a name in [`MASK_KINDS`].
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

    def forward(
        self, states: ReferenceStates, predicted: torch.Tensor, tokens: TokenInputs | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            states ([`ReferenceStates`]):
                States of the reference model.
            predicted (`torch.Tensor` of shape `(2B, T-1)`, bool):
                Positions that predict a response token.
            tokens ([`TokenInputs`], *optional*):
                What else a kind of [`MASK_KINDS`] may read.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: reward mask and divergence mask, each `(2B, T-1)` float32, zero
            outside the completion.
        """
        reward_mask = divergence_mask = ones = predicted.float()
        if self.mask_type in MASK_KINDS:
            reward_mask, divergence_mask = kind_weights(self.mask_type, tokens or TokenInputs(predicted, states))
        elif self.learned:
            weights = {
                name: scatter_tokens(mask(states.layer_states), predicted) for name, mask in self.learned.items()
            }
            reward_mask = weights.get("reward", weights.get("common", ones))
            divergence_mask = weights.get("divergence", weights.get("common", ones))
        return reward_mask if self.masks_reward else ones, divergence_mask if self.masks_divergence else ones


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
