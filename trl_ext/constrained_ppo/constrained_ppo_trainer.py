"""PPO with a critic and learned Lagrange multipliers on [`~trl.GRPOTrainer`]. The path of one batch:

    _generate_and_score_completions      TRL generates and calls the next two hooks, which fill in a `Rollout`
    _calculate_rewards                   rewards of all processes, `(N, K)`
    _get_per_token_logps_and_entropies   log-probabilities and, from one forward (`CriticCompanion.forward`), values
    _estimate                            rewards and KL of each token, advantages and returns: `reward_streams`, `gae`
    _close_rollout                       dual step, KL coefficient, averages: `RolloutController.close_rollout`
    RolloutController.mix                one advantage for each token: `mix_advantages`, equation (4.4)
    _compute_loss                        TRL's clipped policy loss with those advantages, and `clipped_value_loss`
    compute_loss                         skips the update where the policy has moved too far from the rollout

Without a critic, `GroupRelativeMixin` takes the place of `_estimate` and of the value loss.
What the hooks tell each other stands in `self.rollout`; what the loss needs, in the batch.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from .._upstream import disable_gradient_checkpointing, reference_built_by
from ..core.companion import CompanionMixin
from ..core.dropout import disable_dropout
from ..core.files import warn_of_failure
from ..core.four_bits import keep_four_bits_trainable
from ..core.model_card import MethodCardMixin
from ..core.recorder import ForwardRecorder
from ..core.safe_text import known_secrets, redacted
from ..core.tokenizer_check import check_tokenizer
from ..optim.install import OwnOptimizerMixin
from .adaptation import NonFiniteLossError, RolloutController, mean_divergences
from .advantages import adaptive_lambda, gae, reward_streams, token_divergence
from .checkpoint import STOP_FILE, CheckpointMixin, write_json
from .completion_table import CompletionTableMixin
from .constrained_ppo_config import ConstrainedPPOConfig, checked_config
from .critic import (
    VALUE_HEADS,
    CriticCompanion,
    build_critic,
    clipped_value_loss,
    critic_sums,
    record_critic,
    record_heads,
    record_update,
    update_statistics,
    value_heads_of,
)
from .ensemble import EnsembleMonitor
from .gold import GoldMetricMixin, gold_dataset
from .multipliers import LagrangeMultipliers
from .pretrained_critic import pretrained_critic
from .prompts import check_prompts, random_rows
from .reference import check_reference, divergence_warning, reference_builder
from .report import PAPER, CalibrationCallback, ConstraintDashboardCallback, run_section
from .retired import refuse_retired
from .reward_functions import RewardFunction, guarded, note_reward, token_reward_tensors
from .rollout import Rollout
from .scores import ScoreScaling, size_warning, value_clipranges
from .stop_tokens import stop_token_ids
from .threshold_search.callback import ThresholdSearchCallback
from .without_critic import GroupRelativeMixin


logger = get_logger(__name__)
# Keyword of the policy's forward that asks for values too
_WITH_VALUES = {"with_values": True}
# What `_get_per_token_logps_and_entropies` takes beside tokens, for models that read more than text
_MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
# Rollouts that a critic may need to reach a reward's size before that is worth a word
_FAR = 50
# Standard errors by which the mean KL of a rollout must lie from zero for a warning, and nats
_STANDARD_ERRORS, _NATS = 5.0, 0.05


class ConstrainedPPOTrainer(
    GroupRelativeMixin,
    GoldMetricMixin,
    CheckpointMixin,
    CompletionTableMixin,
    CompanionMixin,
    MethodCardMixin,
    OwnOptimizerMixin,
    GRPOTrainer,
):
    """
    PPO with a critic and, under constraints, learned Lagrange multipliers that hold rewards in their useful range
    (https://huggingface.co/papers/2310.04373).

    Generation, reward functions and models, PEFT, evaluation and logging are [`~trl.GRPOTrainer`]'s. The
    critic has one value head for each reward and one for the KL; with `critic="none"` advantages are relative to the
    other completions of a prompt, as in GRPO.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `PeftModel`):
            Policy.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Rewards, as [`~trl.GRPOTrainer`] takes them.
        args ([`ConstrainedPPOConfig`], *optional*):
            Configuration. Defaults to plain PPO.
        train_dataset (`~datasets.Dataset` or `~datasets.IterableDataset`, *optional*):
            Prompts to train on.
        eval_dataset (`~datasets.Dataset`, `~datasets.IterableDataset` or `dict`, *optional*):
            Prompts to evaluate on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer or processor. Defaults to the policy's.
        critic_model (`str`, [`~transformers.PreTrainedModel`] or `torch.nn.Module`, *optional*):
            With `critic="separate"`, the model that the critic's backbone starts from. With `critic="shared"`, a
            module from the policy's hidden states `(B, T, H)` to values `(B, T, K+1)`, in place of linear heads. With
            either, the folder or Hub id of a policy beside which an earlier run saved its critic, to go on with that.
        gold_reward (`Callable`, *optional*):
            The metric that the rewards stand in for, with the signature of a reward function, async or not, higher is
            better. It is called in evaluation only, on `eval_dataset`, and logged as `eval_gold`.
        ref_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Model that the KL is measured from. Defaults to a frozen copy of the policy as it is handed over, or to
            the policy with its adapter off.
        kwargs (`Any`):
            The other arguments of [`~trl.GRPOTrainer`], by name.

    Attributes:
        controller ([`RolloutController`]): What adapts from rollout to rollout.
        rollout ([`Rollout`]): The newest rollout.
        search_callback ([`ThresholdSearchCallback`] or `None`): The threshold search, with `search`.
        stop_reason (`str` or `None`): Why training ended before its last step.

    Raises:
        TypeError: If `args` is not a [`ConstrainedPPOConfig`], `gold_reward` is no function, or an argument is one of
            TRL's `PPOTrainer`.
        ValueError: If a constraint names no reward, `critic_model` has another number of streams or width, or
            `train_dataset` holds less than one rollout.

    Example:

    ```python
    from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer

    trainer = ConstrainedPPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=[helpfulness, brevity],
        args=ConstrainedPPOConfig(method="xi", constraints=[{"reward": "brevity", "threshold": 0.5}]),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "grpo", "trl_ext", "constrained-ppo"]
    _name = "Constrained PPO"
    _paper = PAPER

    args: ConstrainedPPOConfig
    beta: float
    reward_func_names: list[str]
    eos_token_ids: list[int]
    reward_funcs: list[Any]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: ConstrainedPPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        critic_model: str | nn.Module | None = None,
        gold_reward: Callable[..., Any] | None = None,
        ref_model: str | PreTrainedModel | None = None,
        **kwargs: Any,
    ):
        refuse_retired(kwargs, type(self).__name__)
        args = checked_config(args, model, gold_reward, eval_dataset)
        check_reference(ref_model, model, kwargs.get("peft_config"), args.kl_coef)
        for name, dataset in (("train", train_dataset), ("eval", eval_dataset)):
            check_prompts(dataset, name)
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        if any(isinstance(reward, str) for reward in rewards):
            # TRL loads rewards given by name with an auto class; they may have an equilibrium head
            from ..equilibrium import register_auto_classes

            register_auto_classes()
        with reference_built_by(reference_builder(model, ref_model), loads_policy=isinstance(model, str)):
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        check_tokenizer(self.processing_class, self.model)
        self._check_prompts()
        self.eos_token_ids = stop_token_ids(args.generation_kwargs, self.eos_token_ids)
        self._has_own_reference = ref_model is not None
        self.gold_dataset = gold_dataset(args.metric_for_best_model, eval_dataset)
        self._warned: set[str] = set()
        self.gold_reward = gold_reward
        self.controller = RolloutController(args, self.reward_func_names)
        # TRL logs by name, and would take two rewards of one name for one
        self.reward_func_names = self.controller.reward_names
        self.reward_funcs = guarded(self.reward_funcs, self.reward_func_names, args)
        self.ensembles = EnsembleMonitor(self.reward_funcs, self.reward_weights.tolist(), args)
        self.value_coefs = self._value_coefs()
        self.rollout = Rollout()
        self.resumed = False
        self.stop_reason: str | None = None
        self.scores = self._score_scaling()
        self._attach_critic(critic_model)
        keep_four_bits_trainable(self.model)
        models = [one for one in (self.model, self.ref_model) if one is not None and args.disable_dropout]
        self._dropped = [probability for one in models for probability in disable_dropout(one)]
        self.add_callback(CalibrationCallback(self))
        self.search_callback: ThresholdSearchCallback | None = None
        if args.search_config is not None:
            self.search_callback = ThresholdSearchCallback(self, args.search_config)
            self.add_callback(self.search_callback)
        if args.dashboard:
            self.add_callback(ConstraintDashboardCallback(self, show_table=not args.disable_tqdm))

    @property
    def num_gold_evaluations(self) -> int:
        """How often the gold metric was measured while training."""
        return self.controller.stopping.num_gold_evaluations

    @property
    def multipliers(self) -> LagrangeMultipliers | None:
        """The multipliers, or `None` where no constraint acts through one."""
        return self.controller.multipliers

    @property
    def critic(self) -> nn.Module | None:
        """The critic, attached to the policy as its submodule `value_heads`; `None` without one."""
        return getattr(self.policy, VALUE_HEADS) if self.has_companion else None

    @property
    def warms_up(self) -> bool:
        """Whether the step under way trains the critic alone."""
        return self.model.training and self.state.global_step < self.args.critic_warmup_steps

    def _check_prompts(self) -> None:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        for name, dataset in (("train", self.train_dataset), ("eval", self.eval_dataset)):
            check_prompts(dataset, name, tokenizer)
        size = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        needed = self.args.generation_batch_size // self.num_generations
        if size is not None and size < needed:
            raise ValueError(
                f"`train_dataset` has {size} prompts and one rollout takes {needed}. Give more prompts, or lower "
                "`per_device_train_batch_size` or `steps_per_generation`."
            )

    def _value_coefs(self) -> list[float]:
        """Weight of the value loss of each stream, the KL last; a constraint's own stream has that of its reward."""
        coefs, controller = self.args.vf_coefs(len(self.reward_funcs)), self.controller
        own = [
            coefs[index]
            for index, constraint in zip(controller.constrained, controller.constraints, strict=True)
            if constraint.is_derived
        ]
        return [*coefs, *own, self.args.kl_vf_coef]

    def _score_scaling(self) -> ScoreScaling | None:
        args = self.args
        if not args.use_score_scaling and args.score_clip is None:
            return None
        return ScoreScaling(self.controller.stream_names, args.use_score_scaling, args.use_score_norm, args.score_clip)

    def _attach_critic(self, critic_model: str | nn.Module | None) -> None:
        args, streams = self.args, self.controller.stream_names
        if args.critic == "none":
            if critic_model is not None:
                raise ValueError("`critic_model` is given and `critic='none'`. Leave it out, or set `critic`.")
            return
        if args.critic_max_grad_norm is not None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"`critic_max_grad_norm={args.critic_max_grad_norm}` clips the critic's gradients apart; DeepSpeed "
                "and FSDP clip all gradients at once. Leave it out."
            )
        critic_model = pretrained_critic(critic_model, self.policy, streams, args)
        companion = CriticCompanion(
            self.policy,
            build_critic(self.accelerator.unwrap_model(self.model), len(streams) + 1, args, critic_model),
            streams,
            learning_rate=args.critic_learning_rate,
            detach=args.critic_detach,
            homeostasis=args.critic_homeostasis_coef > 0,
        )
        self.attach_companion(companion, companion.forward)

    # From generation to the batch

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = self._open_rollout(inputs, "training" if self.model.training else "evaluation")
        rollout = self.rollout
        if self.args.critic == "none":
            self._compare_in_groups(rollout, output)
            return output
        self._estimate(rollout, output)
        # Values and returns as `(B, T, K+1)`: TRL shuffles and splits a batch along the first dimension
        output["state_returns"] = rollout.returns.movedim(0, -1)
        output["old_state_values"] = rollout.values
        if self.args.cliprange_value_unit == "spread":
            ranges = value_clipranges(
                rollout.returns, rollout.values, rollout.mask, self.args.cliprange_value, self._sum
            )
            output["value_clipranges"] = ranges.expand(len(rollout.mask), 1, -1)
        self._close_rollout(rollout)
        output["advantages"] = self._mixed(rollout.advantages, rollout.mask)
        self._log_advantages(output["advantages"], rollout.mask)
        if self.args.multiplier_update == "minibatch" and self.multipliers is not None:
            output["stream_advantages"] = rollout.advantages.permute(1, 2, 0)
            signals = self.controller.constrained_signals(rollout.rewards, self._group_size())
            output["episode_rewards"] = self._own_rows(signals, len(rollout.mask))
        return output

    def _log_advantages(self, advantages: torch.Tensor, mask: torch.Tensor) -> None:
        """Puts means over the tokens of each response where TRL has logged the advantages over its group."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        if (self.num_generations if self.model.training else self.num_generations_eval) == 1:
            metrics.pop("frac_reward_zero_std", None)  # of groups of one
        if not self.log_completions:
            return
        means = (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        found, logged = self.accelerator.gather(means).tolist(), self._logs["advantages"]
        for _ in range(min(len(found), len(logged))):
            logged.pop()
        logged.extend(found)

    def _open_rollout(self, inputs: Any, purpose: Literal["training", "evaluation", "calibration"]) -> dict[str, Any]:
        """TRL's generation and scoring, within which the next two hooks fill in the rollout."""
        self.rollout = Rollout(purpose)
        return super()._generate_and_score_completions(inputs)

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except Exception as error:
            columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in ("prompt", "completion")}
            batch = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids_list, **columns}
            note_reward(error, self.reward_funcs, self.reward_func_names, {**batch, "trainer_state": self.state})
            raise
        self._check_rewards(rewards, prompts)
        self.rollout.rewards = rewards
        for index, reward in enumerate(self.reward_funcs):
            if isinstance(reward, RewardFunction) and reward.token_rewards is not None:
                self.rollout.token_rewards[index] = reward.token_rewards
        if self.gold_reward is not None and self.rollout.purpose == "evaluation":
            self._measure_gold(inputs, prompts, completions, completion_ids_list)
        return rewards

    def _check_rewards(self, rewards: torch.Tensor, prompts: Any) -> None:
        missing = ~torch.isfinite(rewards)
        if self.args.critic == "none":
            # As in GRPO, a reward without a constraint may say nothing of a completion
            constrained = set(self.controller.constrained)
            missing[:, [index for index in range(rewards.size(1)) if index not in constrained]] = False
        rows, columns = missing.nonzero().t().tolist()
        if not rows:
            return
        needing = "every value head needs a target" if self.args.critic != "none" else "a constraint needs their means"
        names = [self.reward_func_names[index] for index in sorted(set(columns))]
        own = rows[0] - self.accelerator.process_index * len(prompts)
        prompt = f", whose prompt is {prompts[own]!r}" if 0 <= own < len(prompts) else ""
        raise ValueError(
            f"The rewards {names} returned None, NaN or an infinite value for a completion, and {needing}. "
            f"The first is row {rows[0]} of the rollout{prompt}. Return a finite number for every "
            "completion."
        )

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        # The log-probabilities at generation come with the values, which `super()` would not ask for
        wanted = self.args.critic != "none" and self.rollout.purpose != "calibration"
        if wanted and model is self.model and self.rollout.scored is None:
            model = self.rollout.scored = ForwardRecorder(model, _WITH_VALUES)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _estimate(self, rollout: Rollout, output: dict[str, Any]) -> None:
        """Values, divergence, advantages and returns of a rollout."""
        rollout.mask, length = self._loss_mask(output), output["completion_ids"].size(1)
        # Without `old_per_token_logps` what was recorded is a PEFT reference, not the policy
        scored = rollout.scored
        if scored is None or "old_per_token_logps" not in output:
            scored = self._score(output)
        rollout.scored = None
        rollout.values = scored.last_tokens("state_values", length)
        rollout.divergence = torch.zeros_like(rollout.values[..., -1])
        if "ref_per_token_logps" in output:
            log_probs, reference = scored.last_tokens("log_probs", length), output["ref_per_token_logps"]
            rollout.divergence = token_divergence(log_probs, reference, self.args.kl_estimator) * rollout.mask
        kl_rewards = -self.controller.kl_coef * rollout.divergence
        streams = reward_streams(
            self._trained_rewards(rollout, output), kl_rewards, rollout.mask, self._token_rewards(rollout)
        )
        alpha, args = self.args.adaptive_lambda_alpha, self.args
        gae_lambda = args.gae_lambda if alpha is None else adaptive_lambda(rollout.mask, alpha)
        rollout.advantages, rollout.returns = gae(
            streams, rollout.values.movedim(-1, 0), rollout.mask, args.gamma, gae_lambda, args.critic_lambda
        )

    def _token_rewards(self, rollout: Rollout) -> dict[int, torch.Tensor]:
        """What tokens earned, but for rewards in whose place distances of whole responses are trained on."""
        distances = self.controller.constrained if self.args.method == "sat" else []
        found = {index: values for index, values in rollout.token_rewards.items() if index not in distances}
        return token_reward_tensors(found, rollout.mask) if found else {}

    def _loss_mask(self, inputs: dict[str, Any]) -> torch.Tensor:
        mask = inputs["completion_mask"]
        return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask

    def _score(self, output: dict[str, Any]) -> ForwardRecorder:
        """Log-probabilities and values of the completions, before any step on them."""
        recorder = ForwardRecorder(self.model, _WITH_VALUES)
        input_ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention_mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        others = {name: output[name] for name in _MULTIMODAL if name in output}
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            self._get_per_token_logps_and_entropies(
                recorder, input_ids, attention_mask, output["completion_ids"].size(1),
                self.args.per_device_train_batch_size, **others,
            )  # fmt: skip
        return recorder

    def _trained_rewards(self, rollout: Rollout, output: dict[str, Any]) -> torch.Tensor:
        """Rewards `(B, K)` that this process's completions are trained on."""
        rewards = self.controller.trained_rewards(rollout.rewards, self._group_size())
        if self.scores is not None:
            if rollout.purpose == "training":
                self.scores.observe(rewards)
            rewards = self.scores(rewards)
        rewards = self._own_rows(rewards, len(output["completion_ids"]))
        if self.args.missing_eos_penalty is not None and self.model.training:
            ends = torch.isin(output["completion_ids"], torch.tensor(self.eos_token_ids, device=rewards.device))
            ended = (ends * output["completion_mask"]).any(dim=1)
            worse = -self.controller.directions(self.reward_weights).to(rewards)
            rewards = rewards + self.args.missing_eos_penalty * (~ended).unsqueeze(1) * worse
        return rewards

    def _group_size(self) -> int:
        """Completions of each prompt, which follow each other."""
        return self.num_generations if self.rollout.purpose == "training" else self.num_generations_eval

    def _own_rows(self, gathered: torch.Tensor, rows: int) -> torch.Tensor:
        return gathered[self.accelerator.process_index * rows :][:rows]

    def _close_rollout(self, rollout: Rollout) -> None:
        """Lets the controller adapt, and records the rollout."""
        training, rewards = rollout.purpose == "training", rollout.rewards
        divergences = None
        if self.args.kl_coef > 0 and rollout.divergence.numel():
            divergences = mean_divergences(rollout.divergence, rollout.mask, self.accelerator.gather)
        metrics = self._metrics["train" if training else "eval"]
        reason = self.controller.close_rollout(
            metrics, rewards, divergences, training, self._group_size(), adapts=not self.warms_up
        )
        if self.ensembles.ensembles:
            alarm = self.ensembles.observe(metrics, self.accelerator.gather, self.accelerator.device, training)
            reason = reason or alarm
        if reason is not None:
            self.end_training(reason)
        if not training:
            return
        if self.args.critic != "none":
            record_heads(metrics, value_heads_of(self.companion.module))
            self._check_rollout(rollout)
        constant = (rewards == rewards[:1]).all(dim=0).tolist() if len(rewards) > 1 else []
        for name in itertools.compress(self.reward_func_names, constant):
            logger.warning_once(
                f"The reward {name!r} was the same for every completion of a rollout, so it said nothing about their "
                "tokens. If it stays so, check the reward function."
            )

    def _check_rollout(self, rollout: Rollout) -> None:
        """Warns once of rewards too large for the critic, and of a KL that cannot be."""
        args, rewards = self.args, rollout.rewards
        if self.scores is not None:
            for name, spread in zip(self.scores.names, self.scores.spreads().tolist(), strict=True):
                self._metrics["train"][f"score_spread/{name}"].append(spread)
        elif args.cliprange_value > 0 and args.cliprange_value_unit == "score":
            sizes = rewards.float().square().mean(dim=0).sqrt()
            if (sizes > _FAR * args.cliprange_value).any():
                message = size_warning(sizes, self.reward_func_names, args.cliprange_value, _FAR)
                self._warn_once("rewards", message)
        if args.kl_coef == 0 or args.kl_estimator != "k1" or len(rewards) < 2:
            return
        found = self.accelerator.gather((rollout.divergence * rollout.mask).sum(dim=1).float())
        mean, error = found.mean().item(), found.std().item() / len(found) ** 0.5
        is_first = self.state.global_step == 0 and not self._has_own_reference
        if (mean < 0 or is_first) and abs(mean) > max(_STANDARD_ERRORS * error, _NATS):
            self._warn_once("divergence", divergence_warning(mean, error))

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            logger.warning(message, main_process_only=True)

    def _mixed(self, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.controller.mix(advantages, mask, self.reward_weights, self._sum)

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    # From the batch to the loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self.args.critic == "none":
            return self._group_relative_loss(model, inputs)
        mask = self._loss_mask(inputs)
        if "stream_advantages" in inputs:
            inputs = {**inputs, "advantages": self._mixed(inputs["stream_advantages"].permute(2, 0, 1), mask)}
        recorder = ForwardRecorder(model, _WITH_VALUES)
        cast(CriticCompanion, self.companion).detach = self.args.critic_detach or self.warms_up
        with self._kl_in_loss(0.0):
            policy_loss = super()._compute_loss(recorder, inputs)
        if self.warms_up:
            # Gradients of zero and not none: an engine waits for those of every parameter
            policy_loss = policy_loss * 0.0
        values = recorder.last_tokens("state_values", mask.size(1))
        cliprange = inputs.get("value_clipranges", self.args.cliprange_value)
        errors = clipped_value_loss(values, inputs["old_state_values"], inputs["state_returns"], cliprange)
        errors = (errors * mask.unsqueeze(-1)).sum(dim=(0, 1))
        loss = policy_loss + (errors.new_tensor(self.value_coefs) * errors).sum() / self._token_normalizer(inputs)
        homeostasis = [output.homeostasis_loss for output in recorder.outputs if output.homeostasis_loss is not None]
        if homeostasis:
            objective = torch.cat(homeostasis).mean()
            self._metrics["train"]["ep/homeostasis_loss"].append(objective.item())
            loss = loss + self.args.critic_homeostasis_coef * objective / self.current_gradient_accumulation_steps
        log_probs = recorder.last_tokens("log_probs", mask.size(1)).detach()
        self._check_update(loss.detach(), log_probs, values.detach(), errors.detach(), inputs)
        return loss

    def _check_update(
        self,
        loss: torch.Tensor,
        log_probs: torch.Tensor,
        values: torch.Tensor | None,
        errors: torch.Tensor | None,
        inputs: dict[str, Any],
    ) -> None:
        """Records the critic, ends a run whose loss is not finite, and sees whether the rollout is spent."""
        mask, metrics = self._loss_mask(inputs), self._metrics["train" if self.model.training else "eval"]
        old_log_probs = inputs.get("old_per_token_logps", log_probs)
        moved = (token_divergence(old_log_probs, log_probs, "k3") * mask).sum()
        sums = statistics = loss.new_zeros(0)
        if values is not None and errors is not None:
            returns = inputs["state_returns"]
            sums = critic_sums(values, returns, errors, mask)
            statistics = update_statistics(
                log_probs - old_log_probs, inputs["advantages"], returns, inputs["old_state_values"], mask
            )
        # One collective and one wait for the device: metrics, the check of the loss, how far the policy has moved
        checks = torch.stack([(~torch.isfinite(loss)).float(), moved.float()])
        parts = [sums.flatten(), checks, statistics, mask.sum().view(1)]
        gathered = self.accelerator.gather(torch.cat(parts).float().unsqueeze(0)).cpu()
        sums_of, checks_of, statistics_of, counts = gathered.split([len(part) for part in parts], dim=1)
        num_broken, moved_sum = checks_of.sum(dim=0).tolist()
        num_tokens = float(counts.sum())
        if values is not None:
            names = [*self.controller.stream_names, "kl"]
            record_critic(metrics, names, sums_of.sum(dim=0).view_as(sums) / max(num_tokens, 1.0))
            record_update(metrics, names, statistics_of, counts.squeeze(1))
        if not self.model.training:
            return
        if num_broken:
            raise NonFiniteLossError(f"The loss is not finite at step {self.state.global_step}.")
        divergence = moved_sum / max(num_tokens, 1.0)
        metrics["kl/update"].append(divergence)
        if self.args.early_stop_kl is not None:
            self.rollout.spent = self.rollout.spent or divergence > self.args.early_stop_kl
            metrics["skipped_updates"].append(float(self.rollout.spent))

    def _token_normalizer(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Response tokens of one accumulation window for each process, as TRL's `dapo` loss counts them."""
        normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            normalizer = normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return normalizer

    @contextmanager
    def _kl_in_loss(self, coefficient: float) -> Iterator[None]:
        beta, self.beta = self.beta, coefficient
        try:
            yield
        finally:
            self.beta = beta

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not self.model.training:
            return loss
        if "episode_rewards" in inputs and not self.warms_up:
            self._minibatch_dual_step(inputs["episode_rewards"], self._loss_mask(inputs))
        if not (self.rollout.spent or self.warms_up):
            return loss
        # With a rate of zero no optimizer moves, and the scheduler sets the next step's anew. Before the backward
        # pass, at whose end DeepSpeed steps: a callback before the optimizer's step would come too late there
        for group in self.optimizer.param_groups:
            if self.rollout.spent or not group.get(VALUE_HEADS):
                group["lr"] = 0.0
        return loss * 0.0 if self.rollout.spent else loss

    def _minibatch_dual_step(self, rewards: torch.Tensor, mask: torch.Tensor) -> None:
        """The official code's dual step: on rewards of episodes weighted by their length."""
        lengths = mask.sum(dim=1, keepdim=True).float()
        totals = self._sum(torch.cat([(rewards * lengths).sum(dim=0), lengths.sum().view(1)]))
        self.controller.step_multipliers((totals[:-1] / totals[-1].clamp(min=1.0)).tolist())

    # Around the steps

    def sample_rewards(self, num_samples: int) -> torch.Tensor:
        """
        Rewards `(N, K)` of the policy as it is on training prompts, over all processes, N at least `num_samples`.
        Random states and logs stay as they were.
        """
        local, world, rank = (
            self.args.per_device_train_batch_size, self.accelerator.num_processes, self.accelerator.process_index
        )  # fmt: skip
        num_batches = -(-num_samples // (local * world))
        rows = random_rows(self.train_dataset, num_batches * world * local, self.args.seed)
        training, devices = self.model.training, [self.accelerator.device] if torch.cuda.is_available() else []
        rewards = []
        with torch.random.fork_rng(devices):
            try:
                self.model.eval()
                for batch in range(num_batches):
                    own = rows[(batch * world + rank) * local :][:local]
                    self._open_rollout([row for row in own for _ in range(self.num_generations_eval)], "calibration")
                    rewards.append(self.rollout.rewards)
            finally:
                self.model.train(training)
                self._metrics["eval"].clear()
                for logged in self._logs.values():
                    logged.clear()
        return torch.cat(rewards)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.stop_reason = None
        try:
            output = super().train(*args, **kwargs)
        except NonFiniteLossError as error:
            self.end_training(f"{error} No parameter has moved since the step before.")
            self._write_stop_reason()
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise
        self._write_stop_reason()
        return output

    def _write_stop_reason(self) -> None:
        """Leaves the reason beside the model, or takes away that of a run which has gone on since."""
        if not self.args.should_save:
            return
        folder, best = Path(self.args.output_dir), self.state.best_model_checkpoint
        if self.stop_reason is None:
            (folder / STOP_FILE).unlink(missing_ok=True)
            return
        record = {"step": self.state.global_step, "reason": self.stop_reason, "best_model_checkpoint": best}
        with warn_of_failure(f"{STOP_FILE} could not be written"):
            write_json(folder, STOP_FILE, record)

    def end_training(self, reason: str) -> None:
        """Ends training after the step under way; the reason is logged, and written to `stop_reason.json`."""
        self.stop_reason = redacted(reason, known_secrets(self.args.hub_token))
        self.control.should_training_stop = True
        logger.warning(f"Training ends at step {self.state.global_step}. {self.stop_reason}", main_process_only=True)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.is_in_train and metric_key_prefix == "eval" and "eval_gold" in metrics:
            reason = self.controller.stopping.check_gold(metrics["eval_gold"])
            if reason is not None:
                self.end_training(reason)
        return metrics

    def _method_section(self, model_id: str) -> str:
        return run_section(self, model_id)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        limit = self.args.critic_max_grad_norm
        if limit is None:
            return super()._clip_grad_norm(model)
        critic = [parameter for _, parameter in self.companion.own_parameters(model)]
        own = {id(parameter) for parameter in critic}
        policy = [parameter for parameter in model.parameters() if id(parameter) not in own]
        norm = self.accelerator.clip_grad_norm_(policy, self.args.max_grad_norm)  # unscales all gradients first
        self._metrics["train"]["critic/grad_norm"].append(float(nn.utils.clip_grad_norm_(critic, limit)))
        return norm
