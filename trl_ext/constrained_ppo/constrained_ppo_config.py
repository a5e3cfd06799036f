"""Configuration of constrained PPO: fields, presets of `method`, and all checks that need no model."""

import logging
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import SchedulerType
from trl import GRPOConfig

from ..core.run_arguments import RunArguments
from ..core.safe_text import WithoutToken
from ..equilibrium.value_heads import SpectralCap, check_value_heads, read_spectral_cap, refuse_value_heads
from ..optim.names import post_init_with_own_optimizer
from .constraints import Constraint, check_constraints, constraint_from_dict
from .gold import check_gold
from .group_settings import check_without_critic, settle_without_critic
from .multipliers import Squash
from .ranges import check_ranges
from .retired import refuse_retired
from .reward_functions import check_reward_functions
from .scores import check_scores
from .stop_tokens import check_stop_tokens
from .threshold_search.config import ThresholdSearchConfig


@dataclass(frozen=True)
class Preset:
    """What a preset of `method` fills in; `None` leaves a field to the user, or to the default of its kind."""

    objective: Literal["kl", "rewards"]
    kind: str | None = None
    squash: Squash | None = "none"
    mixing: Literal["paper", "normalized"] = "normalized"
    whitening: Literal["spread", "streams", "mixture", "none"] = "spread"
    learns_multipliers: bool = True
    units: Literal["spread", "raw"] = "spread"
    learning_rate: float = 0.05
    momentum: float = 0.0
    proportional: float = 3.0
    drift: float = 0.2
    anti_windup: bool = True
    maximum: float | None = 5.0


def _published(objective: Literal["kl", "rewards"], kind: str, squash: Squash) -> Preset:
    """The paper's form of a method."""
    return Preset(
        objective, kind, squash, mixing="paper", whitening="streams", units="raw", learning_rate=0.1, momentum=0.1,
        proportional=10.0, drift=0.0, anti_windup=False, maximum=None,
    )  # fmt: skip


PRESETS: dict[str, Preset] = {
    "ppo": Preset("rewards", whitening="mixture", learns_multipliers=False),
    "sat": Preset("rewards", "==", whitening="mixture", learns_multipliers=False),
    "mu": Preset("kl", ">=", maximum=2.0),
    "xi": Preset("kl", "==", maximum=2.0),
    "all": Preset("rewards", "<="),
    "mu-paper": _published("kl", ">=", "sigmoid"),
    "xi-paper": _published("kl", "==", "tanh"),
    "all-paper": _published("rewards", "<=", "sigmoid"),
    "ppo-lag": Preset("rewards", None, "exp", whitening="mixture"),
}
# Fields that a preset fills in where they are not given, and the preset's names of them
PRESET_FIELDS = (
    {name: name for name in ("objective", "mixing", "whitening")}
    | {
        f"multiplier_{name}": name
        for name in ("squash", "units", "learning_rate", "momentum", "proportional", "drift", "anti_windup")
    }
    | {"multiplier_max": "maximum"}
)
logger = logging.getLogger(__name__)
_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
_RELATIVE_SCHEDULERS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
_CONSTRAINT_KEYS = {one.name for one in fields(Constraint)}
_KL_COEF = 0.2


class _OneGeneration(int):
    """One generation for each prompt, which `GRPOConfig` refuses: it compares with 2, and a critic needs no group."""

    def __lt__(self, other: object) -> bool:
        return False


@dataclass
class ConstrainedPPOConfig(WithoutToken, RunArguments, GRPOConfig):
    r"""
    Configuration of [`ConstrainedPPOTrainer`].

    Fields of [`~trl.GRPOConfig`] keep their meaning, but for those that speak of groups of completions: advantages
    come from a critic, unless `critic="none"`. `overwrite`, `full_disk` and `save_on_signal` are [`RunArguments`]'.

    Parameters:
        > Parameters that control the method

        method (`str`, *optional*):
            Preset, which fills `objective`, `mixing`, `whitening`, the settings of the multipliers and the `kind` of
            every constraint where they are not given: `"ppo"` (no constraints), and after the paper
            (https://huggingface.co/papers/2310.04373) `"mu"` (stay near the reference, rewards at least at their
            thresholds), `"xi"` (at their thresholds), `"all"` (as much reward as possible, at most the thresholds),
            `"sat"` (minus the squared distance to the thresholds, weights fixed); `"mu-paper"`, `"xi-paper"` and
            `"all-paper"`, the same with the paper's squashing, mixing, whitening and raw violations; and `"ppo-lag"`,
            PPO-Lagrangian as safe-rlhf has it.
        objective (`str`, *optional*):
            What is maximised under the constraints: `"kl"`, minus the divergence from the reference, or `"rewards"`,
            the rewards weighted by `reward_weights`, minus the divergence. Defaults to the preset's, or `"kl"`.
        constraints (`list[dict]`, *optional*):
            Each with `reward` (name or index), one of `threshold` (in the reward's units), `quantile` (of the
            reference's samples) and `relative_gain` (over the reference's mean), and `kind` (`">="`, `"<="`, `"=="`,
            or `"per_prompt"`: at least, for each prompt's mean). Further keys are those of [`Constraint`]:
            `probability` (share of responses that may miss the threshold), `per_prompt`, `tolerance` and `spread`.
        mixing (`str`, *optional*):
            `"normalized"`, `(A_0 + sum_i w_i A_i) / (1 + sum_i |w_i|)`, or `"paper"`, equation (4.4). Defaults to the
            preset's, or `"normalized"`.
        whitening (`str`, *optional*):
            How advantages are scaled: `"spread"`, those of each reward by the reward's standard deviation over
            responses, so that the KL stays in nats times `kl_coef`; `"streams"`, each stream whitened over the tokens
            of a rollout before it is mixed, as in the official code (`kl_coef` then cancels from the policy gradient
            of the objective `"kl"`); `"mixture"`, the mixed advantage whitened; or `"none"`, as the paper writes it.
            Defaults to the preset's, or `"spread"`.
        sat_target (`str`, *optional*, defaults to `"batch_mean"`):
            What `"sat"` moves to the threshold: the mean over the rollout, or each `"sample"`, as in the paper, which
            has no meaning for a binary reward.
        calibration_samples (`int`, *optional*, defaults to `64`):
            Responses drawn before training to compare the thresholds with, and to resolve `quantile` and
            `relative_gain`; 0 for none.

        > Parameters that control the multipliers (see [`LagrangeMultipliers`])

        multiplier_units (`str`, *optional*):
            What violations are measured in: `"spread"`, the standard deviation of the reward over responses (the
            constraint's `spread`, or that of the `calibration_samples`, or of the first rollout), or `"raw"`, the
            reward's own units. Defaults to the preset's, or `"spread"`.
        multiplier_learning_rate (`float`, *optional*):
            Step of the dual. Defaults to the preset's, 0.05, or 0.1 in the paper's form.
        multiplier_momentum (`float`, *optional*):
            Momentum of the dual. Defaults to the preset's, 0, or 0.1 in the paper's form.
        multiplier_proportional (`float`, *optional*):
            Coefficient of the violation; 0 is the paper's integral update. Defaults to the preset's, 3, or 10 in the
            paper's form.
        multiplier_drift (`float`, *optional*):
            Step, in spreads, by which a mean is expected to move from rollout to rollout. The smaller beside the
            standard error of a rollout, the more its noise is filtered; 0 for no filter. Defaults to the preset's,
            0.2, or 0 in the paper's form and with a window or moving average.
        multiplier_anti_windup (`bool`, *optional*):
            Whether a multiplier waits while its weight is at a bound. Defaults to the preset's, `True`, or `False` in
            the paper's form.
        multiplier_spread_ema (`float`, *optional*, defaults to `0.0`):
            Decay of an exponential moving average over rollouts that tracks the spreads; 0 leaves them as they were
            before training.
        multiplier_derivative (`float`, *optional*, defaults to `0.0`):
            Coefficient of the change of the violation.
        multiplier_squash_gradient (`bool`, *optional*, defaults to `False`):
            Whether the dual step carries the derivative of the squashing, as in the official code.
        multiplier_squash (`str`, *optional*):
            `"none"` (at least 0 for inequalities), `"sigmoid"`, `"tanh"`, `"softplus"` or `"exp"`. Defaults to the
            preset's, or `"none"`.
        multiplier_init (`float`, *optional*, defaults to `0.0`):
            Start of every multiplier.
        multiplier_max (`float`, *optional*):
            Bound on the size of every multiplier, of the weight with `"exp"`; `inf` for none. Defaults to the
            preset's, 2 for `"mu"` and `"xi"`, none in the paper's form, else 5.
        multiplier_delay_steps (`int`, *optional*, defaults to `0`):
            Rollouts that only observe.
        multiplier_window (`int`, *optional*, defaults to `1`):
            Number of last rollouts whose mean is used.
        multiplier_ema (`float`, *optional*, defaults to `0.0`):
            Decay of an exponential moving average in place of the window.
        multiplier_update (`str`, *optional*, defaults to `"rollout"`):
            `"rollout"`, one dual step for each rollout on the mean over its episodes; or `"minibatch"`, one after
            each minibatch on the mean over its tokens, as the official code, for comparison.

        > Parameters that control PPO

        num_generations (`int`, *optional*, defaults to `1`):
            Responses to each prompt. One is enough with a critic; without one, at least 2.
        gamma (`float`, *optional*, defaults to `0.99`):
            Discount.
        gae_lambda (`float`, *optional*, defaults to `0.95`):
            Decay of generalised advantage estimation.
        kl_coef (`float`, *optional*, defaults to `0.2`):
            Coefficient of the KL as a reward of every token; without a critic, of GRPO's KL term in the loss, and may
            then be given as `beta`.
        beta (`float`, *optional*, defaults to `0.0`):
            Other name of `kl_coef` without a critic; refused with one, where the KL is a reward of every token.
        kl_estimator (`str`, *optional*, defaults to `"k1"`):
            `"k1"`, the log-ratio of the sampled token, or `"k3"`, which is never negative.
        kl_target (`float`, *optional*):
            KL for each token, in nats, to which `kl_coef` adapts (appendix B of the paper). Without it the
            coefficient is fixed.
        kl_step (`float`, *optional*, defaults to `0.1`):
            Step of the adaptive coefficient.
        early_stop_kl (`float`, *optional*):
            Divergence of the policy from the one that generated, for each token, above which the rest of the updates
            on a rollout is skipped.
        vf_coef (`float` or `list[float]`, *optional*, defaults to `0.5`):
            Weight of the value loss of the rewards, one for all or one for each.
        kl_vf_coef (`float`, *optional*, defaults to `0.2`):
            Weight of the value loss of the KL.
        cliprange_value (`float`, *optional*, defaults to `0.2`):
            Range by which a value may move from the one at generation before its loss is clipped; 0 for no clipping.
        missing_eos_penalty (`float`, *optional*):
            Taken from every reward of a training response that ends without an end-of-sequence token, added where less
            is better: to a reward with a negative weight, or with none and bounds from above. Constraints and logs see
            the reward itself.

        > Parameters that control the units of scores and values, and what the gradients see

        use_score_scaling (`bool`, *optional*, defaults to `False`):
            Whether critic and policy are trained on rewards divided by their standard deviation over all responses so
            far. A reward times 1,000 then gives the same run; `kl_coef`, `cliprange_value` and `missing_eos_penalty`
            are in units of that spread. Constraints and logs see the reward itself.
        use_score_norm (`bool`, *optional*, defaults to `False`):
            With `use_score_scaling`, whether their mean is subtracted, too: for rewards far from zero, where the
            critic starts.
        score_clip (`float`, *optional*):
            Bound on the size of a score, after scaling.
        cliprange_value_unit (`str`, *optional*, defaults to `"score"`):
            Unit of `cliprange_value`: `"score"`, that of the rewards as they are trained on, or `"spread"`, for each
            stream the spread of its returns over the rollout around the mean of its values.
        critic_max_grad_norm (`float`, *optional*):
            Bound on the gradient norm of the critic's own parameters, which `max_grad_norm` then leaves to it. What
            the value loss does to a shared backbone counts as the policy's. Defaults to `max_grad_norm` for all
            parameters together.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether dropout is off in policy, reference and critic, adapters and functional dropout included; the
            saved configuration keeps its probabilities.

        > Parameters that control the critic

        critic (`str`, *optional*, defaults to `"shared"`):
            `"shared"`, value heads on the policy's last hidden state; `"separate"`, with a backbone of their own; or
            `"none"`: advantages relative to the other completions of the prompt, as in GRPO.
        critic_model_name_or_path (`str`, *optional*):
            Model that a separate critic's backbone starts from, such as a reward model with the policy's
            tokenizer. Defaults to a copy of the policy's.
        critic_head (`str`, *optional*, defaults to `"linear"`):
            `"linear"`, or `"equilibrium"`: values relax to a fixed point and learn by equilibrium propagation
            ([`EPValueHeads`]).
        critic_hidden_features (`int` or `list[int]`, *optional*, defaults to `[64, 64]`):
            Widths of the relaxing layers of equilibrium heads; a number is one layer.
        critic_feedback (`str`, *optional*, defaults to `"symmetric"`):
            Feedback weights of equilibrium heads: `"symmetric"`, the forward ones transposed, or `"asymmetric"`.
        critic_feedback_angle (`float`, *optional*, defaults to `0.0`):
            Degrees between asymmetric feedback weights and the transposed forward ones at the start, 0 to 180.
        critic_homeostasis_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the homeostasis objective, which straightens asymmetric feedback, in the critic's loss.
        critic_spectral_cap (`float` or `str`, *optional*, defaults to `"auto"`):
            Bound on the spectral norm of equilibrium heads' recurrent weights: a number, `"auto"` for the largest with
            which relaxation always converges, or `None` for no bound.
        critic_learning_rate (`float`, *optional*, defaults to `1e-4`):
            Learning rate of the critic.
        critic_detach (`bool`, *optional*, defaults to `False`):
            Whether the value loss leaves the policy's backbone alone, for a shared critic.
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            First steps that train the critic alone: the policy does not move, and multipliers and `kl_coef` only
            observe.
        critic_score_reward (`str`, *optional*):
            Reward whose value head starts from the score head of `critic_model_name_or_path`, a reward model, for a
            separate critic.

        > Parameters that control rewards and what is estimated from them

        token_rewards (`list[str]`, *optional*):
            Reward functions that return, for each completion, a list with a number for each of its `completion_ids`.
            Constraints and logs see the sum.
        reward_timeout (`float`, *optional*):
            Seconds that a call of a reward function may take.
        reward_retries (`int`, *optional*, defaults to `0`):
            Further calls of a reward function that failed or took too long.
        reward_retry_seconds (`float`, *optional*, defaults to `1.0`):
            Pause before the first of these, doubled before each further one.
        ensemble_alarm (`str`, *optional*, defaults to `"warn"`):
            What happens when the members of a [`RewardEnsemble`] disagree more than at the start: `"warn"` or
            `"stop"`. The start is the first `calibration_samples` responses, at least one rollout.
        ensemble_alarm_deviations (`float`, *optional*, defaults to `2.0`):
            How far a rollout's mean disagreement may rise above the start's, in standard deviations over responses.
        critic_lambda (`float`, *optional*):
            Decay of the estimator that the values are trained on. Defaults to that of the advantages.
        adaptive_lambda_alpha (`float`, *optional*):
            Takes `1 - 1 / (alpha * length)` of each response as lambda of its advantages, in place of `gae_lambda`
            (VAPO, https://huggingface.co/papers/2504.05118, which has 0.05 and `critic_lambda=1`).

        > Parameters that control training without a critic

        group_baseline (`str`, *optional*, defaults to `"mean"`):
            What a completion's reward is compared with under `critic="none"`: the `"mean"` over its prompt's
            completions, as in GRPO, or `"leave_one_out"`, the mean over the others, as in RLOO. `scale_rewards` and
            `multi_objective_aggregation` scale the objective's rewards as in GRPO; `whitening` scales the advantages
            of constraints: by the reward's `"spread"`, `"streams"`, each as `scale_rewards` says, `"mixture"`, the
            mixed advantages by their deviation over the rollout, or `"none"`.

        > Parameters that control when training ends and what is shown

        kl_ceiling (`float`, *optional*):
            KL of a response from the reference, in nats, above which training ends.
        gold_patience (`int`, *optional*):
            Evaluations without a better gold metric after which training ends.
        dashboard (`bool`, *optional*, defaults to `True`):
            Whether to keep a picture of rewards, thresholds, multipliers and KL in the output folder.

        > Parameters that control the threshold search

        search (`dict`, *optional*):
            Nelder-Mead on the thresholds within one run (NM-PPO); its fields are those of `ThresholdSearchConfig`.
    """

    method: Literal["ppo", "mu", "xi", "all", "sat", "mu-paper", "xi-paper", "all-paper", "ppo-lag"] | None = field(
        default=None,
        metadata={"help": "Preset: 'ppo', 'mu', 'xi', 'all', 'sat', 'ppo-lag', or 'mu-paper' and the like."},
    )
    objective: Literal["kl", "rewards"] | None = field(
        default=None, metadata={"help": "What is maximised under the constraints: 'kl' or 'rewards'."}
    )
    constraints: list[dict] = field(
        default_factory=list, metadata={"help": "Constraints, each with reward, threshold and kind."}
    )
    mixing: Literal["paper", "normalized"] | None = field(
        default=None, metadata={"help": "How advantages are mixed: 'normalized' or 'paper' (4.4)."}
    )
    whitening: Literal["spread", "streams", "mixture", "none"] | None = field(
        default=None, metadata={"help": "How advantages are scaled: 'spread', 'streams', 'mixture' or 'none'."}
    )
    sat_target: Literal["batch_mean", "sample"] = field(
        default="batch_mean", metadata={"help": "What 'sat' moves to the threshold: 'batch_mean' or 'sample'."}
    )
    calibration_samples: int = field(
        default=64, metadata={"help": "Responses drawn before training to compare the thresholds with."}
    )
    multiplier_units: Literal["spread", "raw"] | None = field(
        default=None, metadata={"help": "What violations are measured in: 'spread' or 'raw'."}
    )
    multiplier_learning_rate: float | None = field(default=None, metadata={"help": "Step of the dual."})
    multiplier_momentum: float | None = field(default=None, metadata={"help": "Momentum of the dual."})
    multiplier_proportional: float | None = field(default=None, metadata={"help": "Coefficient of the violation."})
    multiplier_drift: float | None = field(
        default=None, metadata={"help": "Step, in spreads, of a mean from rollout to rollout; 0 for no filter."}
    )
    multiplier_anti_windup: bool | None = field(
        default=None, metadata={"help": "Whether a multiplier waits while its weight is at a bound."}
    )
    multiplier_spread_ema: float = field(
        default=0.0, metadata={"help": "Decay of a moving average that tracks the spreads; 0 keeps them."}
    )
    multiplier_derivative: float = field(default=0.0, metadata={"help": "Coefficient of the violation's change."})
    multiplier_squash_gradient: bool = field(
        default=False, metadata={"help": "Carry the derivative of the squashing in the dual step."}
    )
    multiplier_squash: Literal["sigmoid", "tanh", "softplus", "exp", "none"] | None = field(
        default=None, metadata={"help": "Squashing of the multipliers."}
    )
    multiplier_init: float = field(default=0.0, metadata={"help": "Start of every multiplier."})
    multiplier_max: float | None = field(
        default=None, metadata={"help": "Bound on the size of every multiplier; inf for none."}
    )
    multiplier_delay_steps: int = field(default=0, metadata={"help": "Rollouts that only observe."})
    multiplier_window: int = field(default=1, metadata={"help": "Number of last rollouts whose mean is used."})
    multiplier_ema: float = field(default=0.0, metadata={"help": "Decay of an exponential moving average."})
    multiplier_update: Literal["rollout", "minibatch"] = field(
        default="rollout", metadata={"help": "When the dual steps: after each 'rollout' or each 'minibatch'."}
    )
    gamma: float = field(default=0.99, metadata={"help": "Discount."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Decay of generalised advantage estimation."})
    kl_coef: float = field(default=_KL_COEF, metadata={"help": "Coefficient of the KL as a reward of every token."})
    kl_estimator: Literal["k1", "k3"] = field(default="k1", metadata={"help": "Estimator of the KL: 'k1' or 'k3'."})
    kl_target: float | None = field(
        default=None, metadata={"help": "KL for each token, in nats, to which `kl_coef` adapts."}
    )
    kl_step: float = field(default=0.1, metadata={"help": "Step of the adaptive coefficient."})
    early_stop_kl: float | None = field(
        default=None, metadata={"help": "Divergence from the generating policy that ends the updates on a rollout."}
    )
    # A factory: the argument parser drops the plain default of a field that may be a list
    vf_coef: float | list[float] | str = field(
        default_factory=lambda: 0.5,
        metadata={"help": "Weight of the value loss, one for all rewards or one for each."},
    )
    kl_vf_coef: float = field(default=0.2, metadata={"help": "Weight of the value loss of the KL."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clipping range of the value loss."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken from the rewards of a response without an end-of-sequence token."}
    )
    use_score_scaling: bool = field(
        default=False, metadata={"help": "Train on rewards divided by their running standard deviation."}
    )
    use_score_norm: bool = field(
        default=False, metadata={"help": "With `use_score_scaling`, subtract the running mean, too."}
    )
    score_clip: float | None = field(default=None, metadata={"help": "Bound on the size of a score, after scaling."})
    cliprange_value_unit: Literal["score", "spread"] = field(
        default="score", metadata={"help": "Unit of `cliprange_value`: 'score', or 'spread' of the returns."}
    )
    critic_max_grad_norm: float | None = field(
        default=None, metadata={"help": "Bound on the gradient norm of the critic's own parameters."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Whether dropout is off in policy, reference and critic."}
    )
    critic: Literal["shared", "separate", "none"] = field(
        default="shared",
        metadata={"help": "Value heads on the policy ('shared') or with a backbone ('separate'), or 'none', as GRPO."},
    )
    critic_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model that a separate critic's backbone starts from."}
    )
    critic_head: Literal["linear", "equilibrium"] = field(
        default="linear", metadata={"help": "Value heads: 'linear', or 'equilibrium', which relax to a fixed point."}
    )
    critic_hidden_features: list[int] = field(
        default_factory=lambda: [64, 64], metadata={"help": "Widths of the relaxing layers of equilibrium heads."}
    )
    critic_feedback: Literal["symmetric", "asymmetric"] = field(
        default="symmetric", metadata={"help": "Feedback weights of equilibrium heads."}
    )
    critic_feedback_angle: float = field(
        default=0.0, metadata={"help": "Degrees between feedback and transposed forward weights at the start."}
    )
    critic_homeostasis_coef: float = field(
        default=0.0, metadata={"help": "Weight of the homeostasis objective of equilibrium heads."}
    )
    critic_spectral_cap: SpectralCap = field(
        default="auto",
        metadata={"help": "Bound on the recurrent weights of equilibrium heads: a number, 'auto' or none."},
    )
    critic_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the critic."})
    critic_detach: bool = field(
        default=False, metadata={"help": "Stop the gradient of the value loss at the policy's backbone."}
    )
    critic_warmup_steps: int = field(default=0, metadata={"help": "First steps that train the critic alone."})
    critic_score_reward: str | None = field(
        default=None, metadata={"help": "Reward whose value head starts from the critic model's score head."}
    )
    token_rewards: list[str] = field(
        default_factory=list, metadata={"help": "Reward functions that return a number for each token."}
    )
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that a call of a reward function may take."}
    )
    reward_retries: int = field(default=0, metadata={"help": "Further calls of a reward function that failed."})
    reward_retry_seconds: float = field(
        default=1.0, metadata={"help": "Pause before the first retry, doubled before each further one."}
    )
    ensemble_alarm: Literal["warn", "stop"] = field(
        default="warn", metadata={"help": "What happens when members of an ensemble disagree: 'warn' or 'stop'."}
    )
    ensemble_alarm_deviations: float = field(
        default=2.0, metadata={"help": "How far disagreement may rise above the start's, in standard deviations."}
    )
    critic_lambda: float | None = field(
        default=None, metadata={"help": "Decay of the estimator that the values are trained on."}
    )
    adaptive_lambda_alpha: float | None = field(
        default=None, metadata={"help": "Lambda of each response is 1 - 1 / (alpha * length), not `gae_lambda`."}
    )
    group_baseline: Literal["mean", "leave_one_out"] = field(
        default="mean", metadata={"help": "Baseline without a critic: 'mean' of the group or 'leave_one_out'."}
    )
    kl_ceiling: float | None = field(
        default=None, metadata={"help": "KL of a response, in nats, above which training ends."}
    )
    gold_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without a better gold metric after which training ends."}
    )
    dashboard: bool = field(default=True, metadata={"help": "Keep a picture of the run in the output folder."})
    search: dict | str | None = field(
        default=None, metadata={"help": "Threshold search within one run; see `ThresholdSearchConfig`."}
    )
    num_generations: int | None = field(
        default=1, metadata={"help": "Completions of each prompt. One is enough: advantages come from a critic."}
    )
    beta: float = field(default=0.0, metadata={"help": "Other name of `kl_coef` without a critic; not used with one."})

    # What stands for a preset where `method` names none
    _no_method = Preset("kl")

    def __new__(cls, *args: Any, **kwargs: Any) -> "ConstrainedPPOConfig":
        refuse_retired(kwargs, cls.__name__)
        return super().__new__(cls)

    def __post_init__(self):
        check_ranges(self)
        if self.critic == "none":
            settle_without_critic(self)
        one = self.num_generations == 1
        if one:
            self.num_generations = _OneGeneration(1)
        if self.critic != "none" and self.beta:
            raise ValueError(
                f"`beta={self.beta}` adds GRPO's KL loss; here the KL is a reward of every token. Use `kl_coef`."
            )
        # GRPOTrainer keeps a reference model and scores it only where `beta` is not zero
        self.beta = self.kl_coef
        post_init_with_own_optimizer(self, super().__post_init__)
        if one:
            self.num_generations = 1
        self._apply_preset()
        self._check_divergence()
        check_scores(self)
        check_stop_tokens(self.generation_kwargs, self.use_vllm)
        check_reward_functions(self)
        self._check_estimation()
        self._check_method()
        self._check_search()

    @property
    def learns_multipliers(self) -> bool:
        """Whether constraints act through multipliers, and not, as for `"sat"`, through the rewards."""
        return bool(self.constraints) and (self.method is None or PRESETS[self.method].learns_multipliers)

    @property
    def search_config(self) -> ThresholdSearchConfig | None:
        """`search`, parsed and checked, or `None` without it."""
        return None if self.search is None else ThresholdSearchConfig.from_dict(self.search)

    def vf_coefs(self, num_rewards: int) -> list[float]:
        """The weight of the value loss of each reward: `vf_coef` is one number for all, or one for each."""
        given = self.vf_coef if isinstance(self.vf_coef, list) else [self.vf_coef]
        coefficients = [float(coefficient) for coefficient in given]
        if len(coefficients) not in (1, num_rewards):
            raise ValueError(
                f"`vf_coef={self.vf_coef}` has {len(coefficients)} numbers and there are {num_rewards} rewards. Give "
                "one for all, or one for each."
            )
        return coefficients * num_rewards if len(coefficients) == 1 else coefficients

    def _apply_preset(self) -> None:
        preset = PRESETS[self.method] if self.method is not None else self._no_method
        if self.multiplier_drift is None and (self.multiplier_window > 1 or self.multiplier_ema > 0):
            self.multiplier_drift = 0.0
        for name, own in PRESET_FIELDS.items():
            if getattr(self, name) is None:
                setattr(self, name, getattr(preset, own))
        if preset.kind is not None:
            self.constraints = [{"kind": preset.kind, **constraint} for constraint in self.constraints]

    def _check_divergence(self) -> None:
        needs_divergence = [name for name in ("kl_target", "kl_ceiling") if getattr(self, name) is not None]
        if needs_divergence and self.kl_coef == 0:
            raise ValueError(
                f"`{needs_divergence[0]}` needs the divergence from the reference, which `kl_coef=0` does not "
                "compute. Set `kl_coef` to a small positive number."
            )

    def _check_estimation(self) -> None:
        """Refuses settings of estimators and warm-up that cannot be used."""
        if self.critic_warmup_steps and self.lr_scheduler_type in _RELATIVE_SCHEDULERS:
            raise ValueError(
                f"`critic_warmup_steps={self.critic_warmup_steps}` holds the policy through its learning rate, which "
                f"`lr_scheduler_type={str(self.lr_scheduler_type)!r}` does not set anew at each step. Choose another "
                "scheduler."
            )
        if self.critic_score_reward is not None and (self.critic != "separate" or self.critic_head != "linear"):
            raise ValueError(
                f"`critic_score_reward={self.critic_score_reward!r}` needs `critic='separate'` and "
                f"`critic_head='linear'`, got {self.critic!r} and {self.critic_head!r}: a score head reads its own "
                "backbone."
            )

    def _check_method(self) -> None:
        if self.critic == "none":
            check_without_critic(self)
        elif self.group_baseline != "mean":
            raise ValueError(
                f"`group_baseline={self.group_baseline!r}` needs `critic='none'`: with a critic its values are the "
                "baseline."
            )
        elif self.loss_type not in _LOSS_TYPES:
            raise ValueError(
                f"`loss_type={self.loss_type!r}` reads one advantage for each response; here every token has its own. "
                f"Use one of {_LOSS_TYPES}; 'dapo' is the mean over tokens."
            )
        elif self.off_policy_mask_threshold is not None or self.sync_ref_model:
            name = "sync_ref_model" if self.sync_ref_model else "off_policy_mask_threshold"
            raise ValueError(f"`{name}` is not supported with a critic in the policy. Leave it out.")
        if self.early_stop_kl is not None and self.lr_scheduler_type in _RELATIVE_SCHEDULERS:
            raise ValueError(
                "`early_stop_kl` skips updates through the learning rate, which `lr_scheduler_type="
                f"{str(self.lr_scheduler_type)!r}` does not set anew at each step. Choose another scheduler."
            )
        self._check_critic()
        if self.method == "ppo" and self.constraints:
            others = sorted(set(PRESETS) - {"ppo"})
            raise ValueError(f"`method='ppo'` takes no `constraints`. Remove them, or choose one of {others}.")
        if self.method not in (None, "ppo") and not self.constraints:
            raise ValueError(f"`constraints` is empty and `method={self.method!r}` needs at least one.")
        if self.objective == "kl" and not self.constraints:
            raise ValueError(
                "`constraints` is empty and `objective='kl'`, so the policy would only stay at the reference. Add "
                "constraints, or use `method='ppo'`."
            )
        if self.constraints:
            check_constraints(self.parsed_constraints())
        self._check_kl()

    def _check_kl(self) -> None:
        """Refuses KL coefficients that could not reach the policy."""
        if self.objective != "kl" or not self.learns_multipliers:
            return
        if self.kl_coef == 0:
            raise ValueError(
                "`kl_coef=0` leaves nothing to maximise under the constraints, because `objective='kl'` is minus the "
                "divergence times `kl_coef`. Give a positive number, or `objective='rewards'`."
            )
        # Without a critic the KL has no stream that could be whitened
        if self.whitening != "streams" or self.critic == "none":
            return
        if self.kl_target is not None:
            raise ValueError(
                f"`kl_target={self.kl_target}` adapts `kl_coef`, which cancels where `whitening='streams'` brings the "
                "KL of `objective='kl'` to unit size. Use `whitening='spread'`, or leave `kl_target` out."
            )
        if self.kl_coef != _KL_COEF:
            logger.warning(
                f"`kl_coef={self.kl_coef}` cancels from the policy gradient: `whitening='streams'` brings the KL of "
                "`objective='kl'` to unit size, and only the critic's targets see the coefficient. Use "
                "`whitening='spread'` for a coefficient that acts."
            )

    def _check_critic(self) -> None:
        if self.critic == "shared" and self.critic_model_name_or_path is not None:
            raise ValueError(
                f"`critic_model_name_or_path={self.critic_model_name_or_path!r}` needs `critic='separate'`: value "
                "heads on the policy have no backbone of their own."
            )
        self.critic_spectral_cap = read_spectral_cap(self.critic_spectral_cap)
        if self.critic_head == "linear":
            refuse_value_heads(self, prefix="critic_")
        else:
            check_value_heads(self, prefix="critic_")

    def _check_search(self) -> None:
        search = self.search_config
        if search is None:
            return
        if not self.learns_multipliers:
            raise ValueError(
                "`search` moves the thresholds of constraints that act through multipliers, and "
                f"`method={self.method!r}` has none. Use 'xi', as the paper, or 'mu', with `constraints`."
            )
        rewards = [constraint["reward"] for constraint in self.constraints]
        search.check_budget(len(rewards))
        if all(isinstance(reward, str) for reward in rewards):
            search.check_rewards(rewards)
        search.keep_best_policy(self)

    def parsed_constraints(self) -> list[Constraint]:
        """The constraints as objects; refuses one that lacks a key or has one too many."""
        parsed = []
        for constraint in self.constraints:
            unknown, missing = set(constraint) - _CONSTRAINT_KEYS, {"reward"} - set(constraint)
            if unknown or missing:
                raise ValueError(
                    f"The constraint {constraint} must have the keys `reward`, one of `threshold`, `quantile` and "
                    "`relative_gain`, and `kind`, and may have `probability`, `per_prompt`, `tolerance` and `spread`; "
                    f"look at {sorted(map(str, unknown | missing))}."
                )
            if self.calibration_samples == 0 and "threshold" not in constraint:
                raise ValueError(
                    f"The constraint {constraint} states its threshold relative to the reference, which "
                    "`calibration_samples=0` does not measure. Set it to 64 or more, or state `threshold`."
                )
            parsed.append(constraint_from_dict(constraint))
        return parsed


def checked_config(args: Any, model: Any, gold_reward: Any, eval_dataset: Any) -> ConstrainedPPOConfig:
    """
    The configuration of a trainer: plain PPO by default, and with a gold metric that metric to choose the best
    checkpoint by, unless another is named.
    """
    if args is None:
        name = model if isinstance(model, str) else model.config.name_or_path
        args = ConstrainedPPOConfig(f"{name.rstrip('/').split('/')[-1]}-PPO", method="ppo")
    if not isinstance(args, ConstrainedPPOConfig):
        raise TypeError(
            f"`args` must be a `ConstrainedPPOConfig`, got `{type(args).__name__}`. For plain PPO give "
            "`ConstrainedPPOConfig(output_dir, method='ppo')`."
        )
    check_gold(args, gold_reward, eval_dataset)
    if gold_reward is not None and args.metric_for_best_model in (None, "loss"):
        args.metric_for_best_model, args.greater_is_better = "gold", True
    return args
