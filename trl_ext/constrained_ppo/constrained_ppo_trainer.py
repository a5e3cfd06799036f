import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from .._upstream import disable_gradient_checkpointing, keep_from_vllm, open_rollout, restore_rollout
from ..core.model_card import MethodCardMixin
from ..core.parameter_groups import move_to_own_groups
from .advantages import gae, reward_streams
from .calibration import CalibrationCallback
from .card import PAPER, run_section
from .constrained_ppo_config import ConstrainedPPOConfig, checked_config
from .controller import RolloutController
from .critic import VALUE_HEADS, ValueRecorder, add_value_heads, build_critic, clipped_value_loss, value_heads_of
from .dashboard import ConstraintDashboardCallback
from .kl_controller import token_divergence
from .lagrangian import LagrangeMultipliers
from .rollout_metrics import constant_rewards, mean_divergences, record_critic, record_value_heads
from .run_state import (
    MULTIPLIERS_FILE,
    STATE_FILE,
    STOP_FILE,
    load_critic,
    load_rollout,
    read_json,
    save_critic,
    save_rollout,
    write_json,
)
from .stopping import NonFiniteLossError
from .threshold_search_callback import add_threshold_search


logger = get_logger(__name__)
# What `_get_per_token_logps_and_entropies` takes beside tokens, for models that read more than text
_MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class ConstrainedPPOTrainer(MethodCardMixin, GRPOTrainer):
    """
    PPO with a critic and, under constraints, learned Lagrange multipliers that hold rewards in their useful range
    (https://huggingface.co/papers/2310.04373).

    Generation, reward functions and models, PEFT, evaluation and logging are [`~trl.GRPOTrainer`]'s. The
    critic has one value head for each reward and one for the KL.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `PeftModel`):
            Policy.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            Rewards, as [`~trl.GRPOTrainer`] takes them.
        args ([`ConstrainedPPOConfig`], *optional*):
            Configuration. Defaults to plain PPO.
        critic_model (`str`, [`~transformers.PreTrainedModel`] or `torch.nn.Module`, *optional*):
            With `critic="separate"`, the model that the critic's backbone starts from. With `critic="shared"`, a
            module from the policy's hidden states `(B, T, H)` to values `(B, T, K+1)`, in place of linear heads.
        gold_reward (`Callable`, *optional*):
            The metric that the rewards stand in for, with the signature of a reward function, higher is better. It is
            called in evaluation only, on `eval_dataset`, and logged as `eval_gold`.
        kwargs (`Any`):
            The other arguments of [`~trl.GRPOTrainer`], by name.

    Raises:
        TypeError: If `args` is not a [`ConstrainedPPOConfig`].
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

    _tag_names = ["trl", "trl_ext", "constrained-ppo"]
    _name = "Constrained PPO"
    _paper = PAPER

    args: ConstrainedPPOConfig
    beta: float

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: ConstrainedPPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        critic_model: str | nn.Module | None = None,
        gold_reward: Callable[..., list[float]] | None = None,
        **kwargs: Any,
    ):
        args = checked_config(args, model, gold_reward, eval_dataset)
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._check_prompts()
        self.gold_reward = gold_reward
        self.controller = RolloutController(args, self.reward_func_names)
        self.stop_reason: str | None = None
        self._rewards_per_func = torch.empty(0, 0)
        self._recorder: ValueRecorder | None = None
        self._calibrating = self._skip_updates = self._records_values = False
        self.resumed = False
        self._attach_critic(critic_model)
        self.add_callback(CalibrationCallback(self))
        self.threshold_search = add_threshold_search(self)
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

    def _check_prompts(self) -> None:
        size = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        needed = self.args.generation_batch_size // self.num_generations
        if size is not None and size < needed:
            raise ValueError(
                f"`train_dataset` has {size} prompts and one rollout takes {needed}. Give more prompts, or lower "
                "`per_device_train_batch_size` or `steps_per_generation`."
            )
        self.args.vf_coefs(len(self.reward_funcs))

    def _attach_critic(self, critic_model: str | nn.Module | None) -> None:
        base = self._base_model()
        critic = build_critic(base, len(self.reward_funcs) + 1, self.args, critic_model)
        uses_homeostasis = self.args.critic_homeostasis_coef > 0
        add_value_heads(base, critic.to(base.device), self.args.critic_detach, uses_homeostasis)
        if self.use_vllm:
            keep_from_vllm(self.vllm_generation, f"{VALUE_HEADS}.")
        names = {f"{VALUE_HEADS}.{name}" for name in critic.state_dict()}
        base._keys_to_ignore_on_save = set(base._keys_to_ignore_on_save or ()) | names

    def _base_model(self) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    @property
    def critic(self) -> nn.Module:
        """The critic, attached to the policy as its submodule `value_heads`."""
        return getattr(self._base_model(), VALUE_HEADS)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        named = (self.model if model is None else model).named_parameters()
        heads = [parameter for name, parameter in named if f"{VALUE_HEADS}." in name and parameter.requires_grad]
        move_to_own_groups(optimizer, [(heads, 0.0)], self.args.critic_learning_rate, tag=VALUE_HEADS)
        return optimizer

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        missing = (~torch.isfinite(rewards)).any(dim=0).nonzero().flatten().tolist()
        if missing:
            names = [self.reward_func_names[index] for index in missing]
            raise ValueError(
                f"The rewards {names} returned None, NaN or an infinite value for a completion, and every value head "
                "needs a target. Return a finite number for every completion."
            )
        self._rewards_per_func = rewards
        if self.gold_reward is not None and not self.model.training and not self._calibrating:
            self._measure_gold(self.gold_reward, inputs, prompts, completions, completion_ids_list)
        return rewards

    def _measure_gold(self, gold_reward, inputs, prompts, completions, completion_ids_list) -> None:
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in ("prompt", "completion")}
        gold = gold_reward(
            prompts=prompts, completions=completions, completion_ids=completion_ids_list, trainer_state=self.state,
            **columns,
        )  # fmt: skip
        if len(gold) != len(completions) or not all(value is not None and value == value for value in gold):
            raise ValueError(
                f"`gold_reward` returned {list(gold)[:4]} for {len(completions)} completions. Return one number for "
                "every completion."
            )
        local = torch.tensor(gold, dtype=torch.float32, device=self.accelerator.device)
        self._metrics["eval"]["gold"].extend(self.accelerator.gather(local).tolist())

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        # The log-probabilities at generation come with the values, which `super()` would not ask for
        if self._recorder is None and self._records_values and model is self.model:
            self._recorder = ValueRecorder(model)
            model = self._recorder
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        self._recorder, self._records_values = None, not self._calibrating
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            recorder, self._recorder, self._records_values = self._recorder, None, False
        if self._calibrating:
            return output
        self._skip_updates = False
        mask, length = self._loss_mask(output), output["completion_ids"].size(1)
        # Without `old_per_token_logps` what was recorded is a PEFT reference, not the policy
        if recorder is None or "old_per_token_logps" not in output:
            recorder = self._score(output)
        values = recorder.values(length)
        divergence = torch.zeros_like(values[..., -1])
        if "ref_per_token_logps" in output:
            log_probs = recorder.log_probs(length)
            divergence = token_divergence(log_probs, output["ref_per_token_logps"], self.args.kl_estimator) * mask
        streams = reward_streams(self._local_rewards(output), -self.controller.kl_coef * divergence, mask)
        advantages, returns = gae(streams, values.movedim(-1, 0), mask, self.args.gamma, self.args.gae_lambda)
        output["state_returns"] = returns.movedim(0, -1)
        output["old_state_values"] = values
        self._close_rollout(divergence, mask)
        output["advantages"] = self._policy_advantages(advantages, mask)
        if self.args.multiplier_update == "minibatch" and self.multipliers is not None:
            output["stream_advantages"] = advantages.permute(1, 2, 0)
            output["episode_rewards"] = self._own_rows(self._rewards_per_func, len(mask))
        return output

    def _loss_mask(self, inputs: dict[str, Any]) -> torch.Tensor:
        mask = inputs["completion_mask"]
        return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask

    def _own_rows(self, gathered: torch.Tensor, rows: int) -> torch.Tensor:
        return gathered[self.accelerator.process_index * rows :][:rows]

    def _score(self, output: dict[str, Any]) -> ValueRecorder:
        """Log-probabilities and values of the completions, before any step on them."""
        recorder = ValueRecorder(self.model)
        input_ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention_mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        others = {name: output[name] for name in _MULTIMODAL if name in output}
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            self._get_per_token_logps_and_entropies(
                recorder, input_ids, attention_mask, output["completion_ids"].size(1),
                self.args.per_device_train_batch_size, **others,
            )  # fmt: skip
        return recorder

    def _local_rewards(self, output: dict[str, Any]) -> torch.Tensor:
        """Rewards `(B, K)` that this process's completions are trained on."""
        rewards = self.controller.trained_rewards(self._rewards_per_func)
        rewards = self._own_rows(rewards, len(output["completion_ids"]))
        if self.args.missing_eos_penalty is not None and self.model.training:
            ends = torch.isin(output["completion_ids"], torch.tensor(self.eos_token_ids, device=rewards.device))
            ended = (ends * output["completion_mask"]).any(dim=1)
            rewards = rewards - self.args.missing_eos_penalty * (~ended).unsqueeze(1)
        return rewards

    def _close_rollout(self, divergence: torch.Tensor, mask: torch.Tensor) -> None:
        training = self.model.training
        means = dict(zip(self.reward_func_names, self._rewards_per_func.mean(dim=0).tolist(), strict=True))
        divergences = mean_divergences(divergence, mask, self.accelerator.gather) if self.args.kl_coef > 0 else None
        metrics = self._metrics["train" if training else "eval"]
        reason = self.controller.close_rollout(metrics, means, divergences, training)
        if reason is not None:
            self.end_training(reason)
        if training:
            record_value_heads(metrics, value_heads_of(self.critic))
            for name in constant_rewards(self.reward_func_names, self._rewards_per_func):
                logger.warning_once(
                    f"The reward {name!r} was the same for every completion of a rollout, so it said nothing about "
                    "their tokens. If it stays so, check the reward function."
                )

    def _policy_advantages(self, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.controller.policy_advantages(
            advantages, mask, self.reward_weights, lambda tensor: self.accelerator.reduce(tensor, reduction="sum")
        )

    def _compute_loss(self, model, inputs):
        mask = self._loss_mask(inputs)
        if "stream_advantages" in inputs:
            advantages = inputs["stream_advantages"].permute(2, 0, 1)
            inputs = {**inputs, "advantages": self._policy_advantages(advantages, mask)}
        recorder = ValueRecorder(model)
        with self._without_kl_loss():
            policy_loss = super()._compute_loss(recorder, inputs)
        values = recorder.values(mask.size(1))
        errors = clipped_value_loss(
            values, inputs["old_state_values"], inputs["state_returns"], self.args.cliprange_value
        )
        errors = (errors * mask.unsqueeze(-1)).sum(dim=(0, 1))
        coefficients = errors.new_tensor([*self.args.vf_coefs(len(self.reward_funcs)), self.args.kl_vf_coef])
        loss = policy_loss + (coefficients * errors).sum() / self._token_normalizer(inputs)
        homeostasis_loss = recorder.homeostasis_loss()
        if homeostasis_loss is not None:
            self._metrics["train"]["ep/homeostasis_loss"].append(homeostasis_loss.item())
            loss = (
                loss + self.args.critic_homeostasis_coef * homeostasis_loss / self.current_gradient_accumulation_steps
            )
        self._check_update(loss.detach(), recorder, values.detach(), errors.detach(), inputs, mask)
        if "episode_rewards" in inputs and self.model.training:
            self._minibatch_dual_step(inputs["episode_rewards"], mask)
        return loss * 0.0 if self._skip_updates and self.model.training else loss

    def _check_update(
        self,
        loss: torch.Tensor,
        recorder: ValueRecorder,
        values: torch.Tensor,
        errors: torch.Tensor,
        inputs: dict[str, Any],
        mask: torch.Tensor,
    ) -> None:
        """Records the critic, ends a run whose loss is not finite, and skips updates too far from the rollout."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        moved = loss.new_zeros(())
        if "old_per_token_logps" in inputs:
            log_probs = recorder.log_probs(mask.size(1)).detach()
            moved = (token_divergence(inputs["old_per_token_logps"], log_probs, "k3") * mask).sum()
        broken, moved_sum, tokens = record_critic(
            metrics, [*self.reward_func_names, "kl"], values, inputs["state_returns"], errors, mask,
            torch.stack([(~torch.isfinite(loss)).float(), moved.float()]), self.accelerator.gather,
        )  # fmt: skip
        if not self.model.training:
            return
        if broken:
            raise NonFiniteLossError(f"The loss is not finite at step {self.state.global_step}.")
        metrics["kl/update"].append(moved_sum / max(tokens, 1.0))
        if self.args.early_stop_kl is not None:
            self._skip_updates = self._skip_updates or metrics["kl/update"][-1] > self.args.early_stop_kl
            metrics["skipped_updates"].append(float(self._skip_updates))
            if self._skip_updates:
                # With a rate of zero no optimizer moves, under any engine; the scheduler sets the next step's anew
                for group in self.optimizer.param_groups:
                    group["lr"] = 0.0

    def _minibatch_dual_step(self, rewards: torch.Tensor, mask: torch.Tensor) -> None:
        """The official code's dual step: on rewards of episodes weighted by their length."""
        lengths = mask.sum(dim=1, keepdim=True).float()
        sums = torch.cat([(rewards[:, self.controller.constrained] * lengths).sum(dim=0), lengths.sum().view(1)])
        totals = self.accelerator.reduce(sums, reduction="sum")
        cast(LagrangeMultipliers, self.multipliers).update((totals[:-1] / totals[-1].clamp(min=1.0)).tolist())

    def _token_normalizer(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Response tokens of one accumulation window for each process, as TRL's `dapo` loss counts them."""
        normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            normalizer = normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return normalizer

    @contextmanager
    def _without_kl_loss(self) -> Iterator[None]:
        beta, self.beta = self.beta, 0.0
        try:
            yield
        finally:
            self.beta = beta

    def sample_rewards(self, num_samples: int) -> torch.Tensor:
        """
        Rewards of responses of the policy as it is to training prompts. Random states and logs stay as they were.

        Args:
            num_samples (`int`):
                Fewest responses, over all processes.

        Returns:
            `torch.Tensor` of shape `(N, K)`: those of all processes.
        """
        local, world, rank = (
            self.args.per_device_train_batch_size, self.accelerator.num_processes, self.accelerator.process_index
        )  # fmt: skip
        num_batches = -(-num_samples // (local * world))
        rows = list(itertools.islice(itertools.cycle(self.train_dataset), num_batches * world * local))
        training, devices = self.model.training, [self.accelerator.device] if torch.cuda.is_available() else []
        rewards = []
        with torch.random.fork_rng(devices):
            try:
                self._calibrating = True
                self.model.eval()
                for batch in range(num_batches):
                    own = rows[(batch * world + rank) * local :][:local]
                    self._generate_and_score_completions(
                        [row for row in own for _ in range(self.num_generations_eval)]
                    )
                    rewards.append(self._rewards_per_func)
            finally:
                self._calibrating = False
                self.model.train(training)
                self._metrics["eval"].clear()
                for logged in self._logs.values():
                    logged.clear()
        return torch.cat(rewards)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            output = super().train(*args, **kwargs)
        except NonFiniteLossError as error:
            self.end_training(f"{error} No parameter has moved since the step before.")
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            output = TrainOutput(self.state.global_step, float("nan"), {})
        if self.stop_reason is not None and self.args.should_save:
            best = self.state.best_model_checkpoint
            record = {"step": self.state.global_step, "reason": self.stop_reason, "best_model_checkpoint": best}
            write_json(Path(self.args.output_dir), STOP_FILE, record)
        return output

    def end_training(self, reason: str) -> None:
        """
        Ends training after the step under way.

        Args:
            reason (`str`):
                Why; logged, and written to `stop_reason.json`.
        """
        self.stop_reason = reason
        self.control.should_training_stop = True
        logger.warning(f"Training ends at step {self.state.global_step}. {reason}", main_process_only=True)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if self.is_in_train and "eval_gold" in metrics:
            reason = self.controller.stopping.check_gold(metrics["eval_gold"])
            if reason is not None:
                self.end_training(reason)
        return metrics

    def _method_section(self, model_id: str) -> str:
        return run_section(self, model_id)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        save_critic(self.critic, folder, self.reward_func_names, self.args.should_save)
        step, batches = open_rollout(self)
        if self.args.should_save:
            write_json(folder, STATE_FILE, {**self.controller.state_dict(), "step": step})
            if self.multipliers is not None:
                write_json(folder, MULTIPLIERS_FILE, self.multipliers.state_dict())
            if self.threshold_search is not None:
                self.threshold_search.save(folder)
        if _internal_call and batches is not None:
            save_rollout(folder, self.accelerator.process_index, batches)
        super().save_model(output_dir, _internal_call=_internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The critic first: a checkpoint without one is refused before anything is overwritten
        if not self.is_fsdp_enabled:
            load_critic(self.critic, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            load_critic(self.critic, str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        remedy = "Resume from a checkpoint of a run with the same `method` and constraints."
        state = read_json(checkpoint, STATE_FILE, remedy)
        if self.multipliers is not None:
            self.multipliers.load_state_dict(read_json(checkpoint, MULTIPLIERS_FILE, remedy))
        self.controller.load_state_dict(state)
        if self.threshold_search is not None:
            self.threshold_search.load(checkpoint)
        # Each epoch draws its own order, which a new sampler would begin anew
        for _ in range(int(float(self.state.epoch or 0.0) + 1e-6)):
            next(iter(self._train_sampler), None)
        device, rank = self.accelerator.device, self.accelerator.process_index
        restore_rollout(self, state["step"], load_rollout(checkpoint, rank, device))
        self.resumed = True
