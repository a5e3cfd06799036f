from dataclasses import dataclass, field
from typing import Literal

from trl import GRPOConfig

from ..optim.factory import check_optim_args, register
from .lagrangian import Constraint, check_constraints


# Preset: objective, kind of every constraint, squashing
PRESETS: dict[str, tuple[str, str | None, str | None]] = {
    "ppo": ("rewards", None, None),
    "mu": ("kl", ">=", "sigmoid"),
    "xi": ("kl", "==", "tanh"),
    "all": ("rewards", "<=", "sigmoid"),
}
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


class _OneGeneration(int):
    """One generation for each prompt, which `GRPOConfig` refuses: it compares with 2, and a critic needs no group."""

    def __lt__(self, other: object) -> bool:
        return False


@dataclass
class ConstrainedPPOConfig(GRPOConfig):
    r"""
    Configuration of [`ConstrainedPPOTrainer`].

    Fields of [`~trl.GRPOConfig`] keep their meaning, but for those that speak of groups of completions: advantages
    come from a critic.

    Parameters:
        > Parameters that control the method

        method (`str`, *optional*):
            Preset of the paper (https://huggingface.co/papers/2310.04373), which fills `objective`, the kind of every
            constraint and `multiplier_squash`: `"ppo"` (no constraints), `"mu"` (stay near the reference, rewards at
            least at their thresholds), `"xi"` (at their thresholds), `"all"` (as much reward as possible, at most the
            thresholds).
        objective (`str`, *optional*, defaults to `"kl"`):
            What is maximised under the constraints: `"kl"`, minus the divergence from the reference, or `"rewards"`,
            the rewards weighted by `reward_weights`, minus the divergence.
        constraints (`list[dict]`, *optional*):
            Each with `reward` (name or index), `threshold` and, unless a preset gives it, `kind` (`">="`, `"<="` or
            `"=="`).
        whiten_streams (`bool`, *optional*, defaults to `True`):
            Whether the advantages of every reward and of the KL are whitened before they are mixed, as in the official
            code. `kl_coef` then cancels from the policy gradient of the objective `"kl"`.

        > Parameters that control the multipliers (see [`LagrangeMultipliers`])

        multiplier_learning_rate (`float`, *optional*, defaults to `0.1`):
            Step of the dual.
        multiplier_momentum (`float`, *optional*, defaults to `0.1`):
            Momentum of the dual.
        multiplier_proportional (`float`, *optional*, defaults to `10.0`):
            Coefficient of the violation; 0 is the paper's integral update.
        multiplier_derivative (`float`, *optional*, defaults to `0.0`):
            Coefficient of the change of the violation.
        multiplier_squash_gradient (`bool`, *optional*, defaults to `False`):
            Whether the dual step carries the derivative of the squashing, as in the official code.
        multiplier_squash (`str`, *optional*):
            `"sigmoid"`, `"tanh"`, `"softplus"` or `"none"`. Defaults to the preset's, or the paper's for the kinds.
        multiplier_init (`float`, *optional*, defaults to `0.0`):
            Start of every multiplier.
        multiplier_max (`float`, *optional*):
            Bound on the size of every multiplier.
        multiplier_delay_steps (`int`, *optional*, defaults to `0`):
            Rollouts that only observe.
        multiplier_window (`int`, *optional*, defaults to `1`):
            Number of last rollouts whose mean is used.

        > Parameters that control PPO

        gamma (`float`, *optional*, defaults to `0.99`):
            Discount.
        gae_lambda (`float`, *optional*, defaults to `0.95`):
            Decay of generalised advantage estimation.
        kl_coef (`float`, *optional*, defaults to `0.2`):
            Coefficient of the KL as a reward of every token. It takes the place of `beta`.
        vf_coef (`float`, *optional*, defaults to `0.5`):
            Weight of the value loss of the rewards.
        kl_vf_coef (`float`, *optional*, defaults to `0.2`):
            Weight of the value loss of the KL.
        cliprange_value (`float`, *optional*, defaults to `0.2`):
            Range by which a value may move from the one at generation before its loss is clipped.
        critic_learning_rate (`float`, *optional*, defaults to `1e-4`):
            Learning rate of the value heads.
        critic_detach (`bool`, *optional*, defaults to `False`):
            Whether the value loss leaves the policy's backbone alone.
    """

    method: Literal["ppo", "mu", "xi", "all"] | None = field(
        default=None, metadata={"help": "Preset of the paper: 'ppo', 'mu', 'xi' or 'all'."}
    )
    objective: Literal["kl", "rewards"] = field(
        default="kl", metadata={"help": "What is maximised under the constraints: 'kl' or 'rewards'."}
    )
    constraints: list[dict] = field(
        default_factory=list, metadata={"help": "Constraints, each with reward, threshold and kind."}
    )
    whiten_streams: bool = field(
        default=True, metadata={"help": "Whiten the advantages of every stream before they are mixed."}
    )
    multiplier_learning_rate: float = field(default=0.1, metadata={"help": "Step of the dual."})
    multiplier_momentum: float = field(default=0.1, metadata={"help": "Momentum of the dual."})
    multiplier_proportional: float = field(default=10.0, metadata={"help": "Coefficient of the violation."})
    multiplier_derivative: float = field(default=0.0, metadata={"help": "Coefficient of the violation's change."})
    multiplier_squash_gradient: bool = field(
        default=False, metadata={"help": "Carry the derivative of the squashing in the dual step."}
    )
    multiplier_squash: Literal["sigmoid", "tanh", "softplus", "none"] | None = field(
        default=None, metadata={"help": "Squashing of the multipliers."}
    )
    multiplier_init: float = field(default=0.0, metadata={"help": "Start of every multiplier."})
    multiplier_max: float | None = field(default=None, metadata={"help": "Bound on the size of every multiplier."})
    multiplier_delay_steps: int = field(default=0, metadata={"help": "Rollouts that only observe."})
    multiplier_window: int = field(default=1, metadata={"help": "Number of last rollouts whose mean is used."})
    gamma: float = field(default=0.99, metadata={"help": "Discount."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Decay of generalised advantage estimation."})
    kl_coef: float = field(default=0.2, metadata={"help": "Coefficient of the KL as a reward of every token."})
    vf_coef: float = field(default=0.5, metadata={"help": "Weight of the value loss of the rewards."})
    kl_vf_coef: float = field(default=0.2, metadata={"help": "Weight of the value loss of the KL."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clipping range of the value loss."})
    critic_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the value heads."})
    critic_detach: bool = field(
        default=False, metadata={"help": "Stop the gradient of the value loss at the policy's backbone."}
    )
    num_generations: int | None = field(
        default=1, metadata={"help": "Completions of each prompt. One is enough: advantages come from a critic."}
    )
    beta: float = field(default=0.0, metadata={"help": "Not used: `kl_coef` takes its place."})

    def __post_init__(self):
        register()
        one = self.num_generations == 1
        if one:
            self.num_generations = _OneGeneration(1)
        if self.beta:
            raise ValueError(
                f"`beta={self.beta}` adds GRPO's KL loss; here the KL is a reward of every token. Use `kl_coef`."
            )
        # GRPOTrainer keeps a reference model and scores it only where `beta` is not zero
        self.beta = self.kl_coef
        super().__post_init__()
        if one:
            self.num_generations = 1
        check_optim_args(self)
        self._apply_preset()
        self._check()

    def _apply_preset(self) -> None:
        if self.method is None:
            return
        if self.method not in PRESETS:
            raise ValueError(f"`method` must be one of {sorted(PRESETS)}, got {self.method!r}.")
        self.objective, kind, squash = PRESETS[self.method]  # type: ignore[assignment]
        if self.method == "ppo" and self.constraints:
            raise ValueError("`method='ppo'` takes no `constraints`. Remove them, or choose 'mu', 'xi' or 'all'.")
        if self.method != "ppo":
            self.constraints = [{**constraint, "kind": kind} for constraint in self.constraints]
            self.multiplier_squash = self.multiplier_squash or squash  # type: ignore[assignment]

    def _check(self) -> None:
        for name in ("kl_coef", "vf_coef", "kl_vf_coef", "cliprange_value", "critic_learning_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"`loss_type={self.loss_type!r}` reads one advantage for each response; here every token has its own. "
                f"Use one of {LOSS_TYPES}; 'dapo' is the mean over tokens."
            )
        if self.off_policy_mask_threshold is not None or self.sync_ref_model:
            name = "sync_ref_model" if self.sync_ref_model else "off_policy_mask_threshold"
            raise ValueError(f"`{name}` is not supported with a critic in the policy. Leave it out.")
        if self.objective == "kl" and not self.constraints:
            raise ValueError(
                "`constraints` is empty and `objective='kl'`, so the policy would only stay at the reference. Add "
                "constraints, or use `method='ppo'`."
            )
        if self.constraints:
            check_constraints(self.parsed_constraints())

    def parsed_constraints(self) -> list[Constraint]:
        """
        The constraints as objects.

        Raises:
            ValueError: If one lacks a key or has one too many.
        """
        parsed = []
        for constraint in self.constraints:
            wrong = set(constraint) ^ {"reward", "threshold", "kind"}
            if wrong - {"kind"}:
                raise ValueError(
                    f"The constraint {constraint} must have the keys `reward`, `threshold` and `kind`; look at "
                    f"{sorted(wrong - {'kind'})}."
                )
            parsed.append(Constraint(**constraint))
        return parsed
