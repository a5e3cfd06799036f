"""Configuration of SparsePO."""

from dataclasses import dataclass, field
from typing import Literal

from trl import DPOConfig

from ..core.checks import Range, check_choice, check_fields
from ..core.run_arguments import RunArguments
from ..core.safe_text import WithoutToken
from ..core.training_ranges import COUNT, DECAY, NOT_NEGATIVE, POSITIVE, SHARE, TRAINING
from ..optim.names import post_init_with_own_optimizer
from .mask_kinds import MASK_KINDS


_OFF_AT_ZERO = Range(at_least=0, remedy="Use 0 to switch it off.")
RANGES: dict[str, Range] = {
    **TRAINING,
    # Of DPOConfig
    "beta": _OFF_AT_ZERO,
    "dataset_num_proc": COUNT,
    "discopop_tau": POSITIVE,
    "label_smoothing": DECAY,
    "ld_alpha": SHARE,
    "loss_type": Range(empty=False, also=str),
    "loss_weights": Range(empty=False),
    "max_length": COUNT,
    "pad_to_multiple_of": COUNT,
    "precompute_ref_batch_size": COUNT,
    "ref_model_mixup_alpha": SHARE,
    "ref_model_sync_steps": COUNT,
    "router_aux_loss_coef": NOT_NEGATIVE,
    "truncation_mode": Range(choices=("keep_start", "keep_end")),
    # Our own
    "divergence_coef": _OFF_AT_ZERO,
    "mask_l1_divergence": _OFF_AT_ZERO,
    "mask_l1_reward": _OFF_AT_ZERO,
    "mask_learning_rate": Range(at_least=0, remedy="Leave it out to use `learning_rate`."),
    "mask_weight_decay": _OFF_AT_ZERO,
}
UNSUPPORTED_LOSS_TYPES = {
    "aot": "it sorts policy and reference sums apart, and a masked divergence belongs to neither",
}


@dataclass
class SparsePOConfig(WithoutToken, RunArguments, DPOConfig):
    r"""
    Configuration of [`SparsePOTrainer`].

    All fields of [`~trl.DPOConfig`] keep their meaning; those that the method cannot honour are refused with a
    `ValueError`. The defaults are the paper's common learned mask (https://huggingface.co/papers/2410.05102).
    `overwrite`, `full_disk` and `save_on_signal` are [`RunArguments`]'.

    Parameters:
        > Parameters that control the masks

        mask_type (`str`, *optional*, defaults to `"learned"`):
            `"learned"`: a small network on the reference model's hidden states; `"activation"`: read off the reference
            model's activations, the paper's MaPO; `"ones"`: no mask, which gives TDPO1, TDPO2 or DPO; `"given"`:
            weights in the data, `chosen_token_weights` and `rejected_token_weights`; `"confidence"`: the tokens of
            which the policy is less sure than of the response on average (ConfPO); `"log_ratio"`: exponentials of the
            log-ratios (in the form of TIS-DPO); or a kind added by [`register_mask_kind`].
        independent_masks (`bool`, *optional*, defaults to `False`):
            Learned masks only: one mask for the rewards and another for the divergences, instead of a common one.
        mask_reward (`bool`, *optional*, defaults to `True`):
            Whether the mask weights the log-ratios; otherwise their weight is one.
        mask_divergence (`bool`, *optional*, defaults to `True`):
            Whether the mask weights the divergences; otherwise their weight is one.
        mask_init (`str`, *optional*, defaults to `"positive"`):
            `"positive"` starts learned masks near one; `"paper"` is the official code's initialisation, where a share
            of the masks starts at zero everywhere and never learns.
        mask_learning_rate (`float`, *optional*):
            Learning rate of learned masks. Defaults to the policy's, as in the paper.
        mask_weight_decay (`float`, *optional*, defaults to `0.01`):
            Decoupled weight decay of learned masks, LayerNorm and biases excluded.
        mask_l1_reward (`float`, *optional*, defaults to `0.0`):
            Weight of the L1 norm of the reward mask, summed over the tokens of a pair.
        mask_l1_divergence (`float`, *optional*, defaults to `0.0`):
            Weight of the L1 norm of the divergence mask, summed over the tokens of a pair.

        > Parameters that control the divergence

        divergence_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the token-level KL(reference || policy). With `mask_type="ones"`, 0 is DPO and 1 is TDPO1.
        detach_chosen_divergence (`bool`, *optional*, defaults to `False`):
            Whether to stop the gradient through the chosen divergence. With `mask_type="ones"` and
            `divergence_coef=alpha` this is TDPO2.

        > Parameters that control speed

        share_prompt (`bool`, *optional*, defaults to `False`):
            Whether both models run once on prompt, chosen and rejected answer in one row, instead of on two rows with
            the prompt in each. Losses and gradients are the same up to rounding. Needs attention that takes a mask
            (`"sdpa"` or `"eager"`) in every layer; other models are refused at construction.

        > Parameters that control the data

        strict_pairs (`bool`, *optional*, defaults to `False`):
            Whether to refuse, naming the row, what is otherwise left out with one warning: pairs without a signal,
            whose completions are equal or have no token once tokenised and cut to `max_length`.
        drop_invalid_pairs (`bool`, *optional*, defaults to `False`):
            What happens now without it, unless `strict_pairs` is set. Kept for old scripts.
    """

    mask_type: str = field(
        default="learned",
        metadata={
            "help": "Source of the token masks: 'learned', 'activation' (the paper's MaPO), 'ones' (no mask), 'given' "
            "(weights in the data), 'confidence', 'log_ratio', or a kind of your own.",
        },
    )
    independent_masks: bool = field(
        default=False,
        metadata={"help": "Learn one mask for the rewards and another for the divergences instead of a common one."},
    )
    mask_reward: bool = field(
        default=True, metadata={"help": "Weight the log-ratios by the mask; otherwise their weight is one."}
    )
    mask_divergence: bool = field(
        default=True, metadata={"help": "Weight the divergences by the mask; otherwise their weight is one."}
    )
    mask_init: Literal["positive", "paper"] = field(
        default="positive",
        metadata={
            "help": "Initialisation of learned masks: 'positive' starts near one, 'paper' is the official code's.",
        },
    )
    mask_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of learned masks. Defaults to the policy's."}
    )
    mask_weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay of learned masks."})
    mask_l1_reward: float = field(
        default=0.0, metadata={"help": "Weight of the L1 norm of the reward mask, summed over the tokens of a pair."}
    )
    mask_l1_divergence: float = field(
        default=0.0,
        metadata={"help": "Weight of the L1 norm of the divergence mask, summed over the tokens of a pair."},
    )
    divergence_coef: float = field(
        default=1.0,
        metadata={"help": "Weight of the token-level KL(reference || policy). With 'ones', 0 is DPO and 1 is TDPO1."},
    )
    detach_chosen_divergence: bool = field(
        default=False,
        metadata={"help": "Stop the gradient through the chosen divergence, as TDPO2 does."},
    )
    share_prompt: bool = field(
        default=False,
        metadata={
            "help": "Run both models once on prompt, chosen and rejected answer in one row, instead of on two rows "
            "with the prompt in each. Same results up to rounding; needs 'sdpa' or 'eager' attention.",
        },
    )
    strict_pairs: bool = field(
        default=False,
        metadata={"help": "Refuse pairs whose completions are equal or have no token, instead of leaving them out."},
    )
    drop_invalid_pairs: bool = field(
        default=False,
        metadata={"help": "Without effect: pairs without a signal are left out unless `strict_pairs` is set."},
    )

    def __post_init__(self):
        check_fields(self, RANGES)
        post_init_with_own_optimizer(self, super().__post_init__)
        self._check_masks()
        self._check_inherited_fields()

    def _check_masks(self) -> None:
        check_choice(self, "mask_type", choices=("learned", "ones", *MASK_KINDS))
        if self.mask_type != "learned":
            for name in ("independent_masks", "mask_l1_reward", "mask_l1_divergence", "mask_learning_rate"):
                if getattr(self, name):
                    raise ValueError(
                        f"`{name}={getattr(self, name)}` applies to learned masks only, and `mask_type` is "
                        f"{self.mask_type!r}. Remove `{name}` or set `mask_type='learned'`."
                    )
        if self.mask_type != "ones" and not (self.mask_reward or self.mask_divergence):
            raise ValueError(
                "`mask_reward` and `mask_divergence` are both False, so no term uses the mask. Set `mask_type='ones'` "
                "to train without masks."
            )

    def _check_inherited_fields(self) -> None:
        if self.strict_pairs and self.drop_invalid_pairs:
            raise ValueError(
                "`strict_pairs=True` refuses what `drop_invalid_pairs=True` leaves out. Remove one of them."
            )
        for loss_type in self.loss_type:
            if loss_type in UNSUPPORTED_LOSS_TYPES:
                raise ValueError(
                    f"`loss_type={loss_type!r}` is not supported: {UNSUPPORTED_LOSS_TYPES[loss_type]}. Use "
                    "`loss_type='sigmoid'`, the paper's loss, or `trl.DPOTrainer`."
                )
        if set(self.loss_type) == {"sft"}:
            raise ValueError(
                "`loss_type=['sft']` alone has no term of the pairs, and nothing that masks weight. Add one, as in "
                "`loss_type=['sigmoid', 'sft']`, or use `trl.SFTTrainer`."
            )
        refusals = {
            "precompute_ref_log_probs": (
                "it stores one sum for each sequence, while the masks and the token-level divergence need the "
                "reference's states and its whole next-token distribution at every token. Set "
                "`precompute_ref_log_probs=False`"
            ),
            "padding_free": "the pairs are scored as rows of one padded batch. Set `padding_free=False`",
            "use_weighting": "WPO weights read unmasked log-probabilities. Set `use_weighting=False`",
            "use_liger_kernel": (
                "it is deprecated in TRL and untested with the masks. Use "
                '`model_init_kwargs={"use_kernels": True}` instead'
            ),
        }
        for name, reason in refusals.items():
            if getattr(self, name):
                raise ValueError(f"`{name}=True` is not supported by SparsePO: {reason}.")
        if self.f_divergence_type != "reverse_kl" and (self.mask_type != "ones" or self.divergence_coef):
            raise ValueError(
                f"`f_divergence_type={self.f_divergence_type!r}` is defined for the log-ratio of a whole response, "
                f"and `mask_type={self.mask_type!r}` with `divergence_coef={self.divergence_coef}` has weighted sums "
                "over tokens in its place. Set `f_divergence_type='reverse_kl'`, or `mask_type='ones'` and "
                "`divergence_coef=0`, which is DPO."
            )
