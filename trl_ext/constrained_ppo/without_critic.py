"""The trainer's steps without a critic: advantages relative to the group, and TRL's loss with its KL term."""

from typing import Any

import torch
from trl import GRPOTrainer

from ..core.recorder import ForwardRecorder
from .adaptation import RolloutController, mean_divergences
from .advantages import token_divergence
from .constrained_ppo_config import ConstrainedPPOConfig
from .group_relative import leave_one_out, reward_advantages
from .rollout import Rollout


class GroupRelativeMixin(GRPOTrainer):
    """What [`ConstrainedPPOTrainer`], whose base this is, does with `critic="none"`."""

    args: ConstrainedPPOConfig
    controller: RolloutController
    rollout: Rollout
    _close_rollout: Any
    _group_size: Any
    _trained_rewards: Any
    _own_rows: Any
    _loss_mask: Any
    _kl_in_loss: Any
    _check_update: Any
    end_training: Any

    def _compare_in_groups(self, rollout: Rollout, output: dict[str, Any]) -> None:
        """Without a critic: each completion's advantage over the others of its prompt, from all processes."""
        args, training = self.args, rollout.purpose == "training"
        rollout.mask = self._loss_mask(output)
        if "old_per_token_logps" in output and "ref_per_token_logps" in output:
            log_probs, reference = output["old_per_token_logps"], output["ref_per_token_logps"]
            rollout.divergence = token_divergence(log_probs, reference, args.kl_estimator) * rollout.mask
        self._close_rollout(rollout)
        penalised = args.missing_eos_penalty is not None and training
        if not (self.controller.constraints or penalised or args.group_baseline != "mean"):
            return  # TRL's own advantages stay
        rows, size = len(rollout.mask), self._group_size()
        signals = self.accelerator.gather(self._trained_rewards(rollout, output))
        rewards = signals[:, : len(self.reward_funcs)]
        objective = torch.zeros_like(signals[:, 0])
        if self.multipliers is None or args.objective != "kl":
            scale, aggregation = args.scale_rewards, args.multi_objective_aggregation
            objective = reward_advantages(rewards, self.reward_weights, size, scale, aggregation)
        streams = self.controller.group_streams(signals, size)
        if args.group_baseline == "leave_one_out":
            objective, streams = (leave_one_out(advantages, rewards, size) for advantages in (objective, streams))
        mixed = self.controller.mix_groups(objective, streams)
        output["advantages"] = self._own_rows(mixed, rows)
        logged = self._logs["advantages"]
        for _ in range(min(len(mixed), len(logged))):
            logged.pop()
        logged.extend(mixed.tolist())
        if args.multiplier_update == "minibatch" and self.multipliers is not None:
            output["objective_advantages"] = self._own_rows(objective, rows)
            output["stream_advantages"] = self._own_rows(streams, rows)
            bounded = self.controller.constrained_signals(rollout.rewards, size)
            output["episode_rewards"] = self._own_rows(bounded, rows)

    def _group_relative_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss, its KL term weighed as the multipliers weigh the objective."""
        if "stream_advantages" in inputs:
            mixed = self.controller.mix_groups(inputs["objective_advantages"], inputs["stream_advantages"])
            inputs = {**inputs, "advantages": mixed}
        recorder, kl_coef = ForwardRecorder(model, {}), self.controller.kl_loss_coef()
        if self.multipliers is not None and self.args.kl_coef > 0:
            self._metrics["train" if self.model.training else "eval"]["kl/loss_coef"].append(kl_coef)
        with self._kl_in_loss(kl_coef):
            loss = super()._compute_loss(recorder, inputs)
        log_probs = recorder.last_tokens("log_probs", inputs["completion_ids"].size(1)).detach()
        self._take_divergence_of_loss(log_probs, inputs)
        self._check_update(loss.detach(), log_probs, None, None, inputs)
        return loss

    def _take_divergence_of_loss(self, log_probs: torch.Tensor, inputs: dict[str, Any]) -> None:
        """The KL of a rollout that only its losses give log-probabilities of, after the last of its micro-batches."""
        count = self.args.steps_per_generation if self.model.training else 1
        pieces = self.rollout.losses_divergences
        if "old_per_token_logps" in inputs or "ref_per_token_logps" not in inputs or len(pieces) == count:
            return
        mask = self._loss_mask(inputs)
        divergence = token_divergence(log_probs, inputs["ref_per_token_logps"], self.args.kl_estimator) * mask
        pieces.append((divergence, mask))
        if len(pieces) < count:
            return
        whole, masks = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        divergences = mean_divergences(whole, masks, self.accelerator.gather)
        metrics = self._metrics["train" if self.model.training else "eval"]
        reason = self.controller.take_divergences(metrics, divergences, self.model.training)
        if reason is not None:
            self.end_training(reason)
