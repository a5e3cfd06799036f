import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOTrainer

from .._compat import disable_gradient_checkpointing, gathered_state_dict, keep_from_vllm
from ..parameter_groups import move_to_own_groups
from .advantages import gae, mix_advantages, whiten
from .constrained_ppo_config import ConstrainedPPOConfig
from .critic import VALUE_HEADS, ValueHeads, add_value_heads, clipped_value_loss
from .lagrangian import LagrangeMultipliers


CRITIC_FILE = "critic.safetensors"
MULTIPLIERS_FILE = "multipliers.json"


class ConstrainedPPOTrainer(GRPOTrainer):
    """
    PPO with a critic and, under constraints, learned Lagrange multipliers that hold rewards in their useful range
    (https://huggingface.co/papers/2310.04373).

    Generation, reward functions and models, PEFT, evaluation and logging are [`~trl.GRPOTrainer`]'s. The critic is a
    set of value heads on the policy, one for each reward and one for the KL.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `PeftModel`):
            Policy.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            Rewards, as [`~trl.GRPOTrainer`] takes them.
        args ([`ConstrainedPPOConfig`], *optional*):
            Configuration.
        critic_model (`torch.nn.Module`, *optional*):
            Module from hidden states `(B, T, H)` to values `(B, T, K+1)`, in place of linear heads.
        kwargs (`Any`):
            The other arguments of [`~trl.GRPOTrainer`], by name.

    Raises:
        TypeError: If `args` is not a [`ConstrainedPPOConfig`].
        ValueError: If a constraint names no reward, or `critic_model` has another number of streams.

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
    _paper = {"title": "Confronting Reward Model Overoptimization with Constrained RLHF", "id": "2310.04373"}

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
        critic_model: nn.Module | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, ConstrainedPPOConfig):
            raise TypeError(
                f"`args` must be a `ConstrainedPPOConfig`, got `{type(args).__name__}`. Its `method` has no default: "
                "give `ConstrainedPPOConfig(output_dir, method='ppo')` for plain PPO."
            )
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._constrained = self._reward_indices()
        self.multipliers = self._build_multipliers()
        self._rewards_per_func = torch.empty(0, 0)
        self._attach_critic(critic_model)

    def _reward_indices(self) -> list[int]:
        indices = []
        for constraint in self.args.parsed_constraints():
            names = self.reward_func_names
            known = constraint.reward in (names if isinstance(constraint.reward, str) else range(len(names)))
            if not known:
                raise ValueError(
                    f"The constraint on {constraint.reward!r} names no reward. The rewards are "
                    f"{dict(enumerate(names))}: use a name or an index."
                )
            indices.append(names.index(constraint.reward) if isinstance(constraint.reward, str) else constraint.reward)
        return indices

    def _build_multipliers(self) -> LagrangeMultipliers | None:
        args = self.args
        if not args.constraints:
            return None
        return LagrangeMultipliers(
            args.parsed_constraints(),
            squash=args.multiplier_squash,
            learning_rate=args.multiplier_learning_rate,
            momentum=args.multiplier_momentum,
            proportional=args.multiplier_proportional,
            derivative=args.multiplier_derivative,
            squash_gradient=args.multiplier_squash_gradient,
            init=args.multiplier_init,
            maximum=args.multiplier_max,
            delay_steps=args.multiplier_delay_steps,
            window=args.multiplier_window,
        )

    def _attach_critic(self, critic_model: nn.Module | None) -> None:
        base = self._base_model()
        hidden_size = base.config.get_text_config().hidden_size
        num_streams = len(self.reward_funcs) + 1
        critic = critic_model or ValueHeads(hidden_size, num_streams)
        critic.to(base.device)
        with torch.no_grad():
            shape = tuple(critic(torch.zeros(1, 2, hidden_size, device=base.device)).shape)
        if shape != (1, 2, num_streams):
            raise ValueError(
                f"`critic_model` maps hidden states `(1, 2, {hidden_size})` to {shape}; it must give (1, 2, "
                f"{num_streams}): one value for each of the {num_streams - 1} rewards and one for the KL."
            )
        add_value_heads(base, critic, self.args.critic_detach)
        if self.use_vllm:
            keep_from_vllm(self.vllm_generation, f"{VALUE_HEADS}.")
        names = {f"{VALUE_HEADS}.{name}" for name in critic.state_dict()}
        base._keys_to_ignore_on_save = set(base._keys_to_ignore_on_save or ()) | names

    def _base_model(self) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    @property
    def critic(self) -> nn.Module:
        """The value heads, attached to the policy as its submodule `value_heads`."""
        return getattr(self._base_model(), VALUE_HEADS)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        named = (self.model if model is None else model).named_parameters()
        heads = [parameter for name, parameter in named if f"{VALUE_HEADS}." in name and parameter.requires_grad]
        move_to_own_groups(optimizer, [(heads, 0.0)], self.args.critic_learning_rate, tag=VALUE_HEADS)
        return optimizer

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        missing = torch.isnan(rewards).any(dim=0).nonzero().flatten().tolist()
        if missing:
            names = [self.reward_func_names[index] for index in missing]
            raise ValueError(
                f"The rewards {names} returned None or NaN for a completion, and every value head needs a target. "
                "Return a number for every completion."
            )
        self._rewards_per_func = rewards
        return rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        completion_mask = output["completion_mask"]
        if "tool_mask" in output:
            completion_mask = completion_mask * output["tool_mask"]
        log_probs, values = self._score(output)
        old_log_probs = output.get("old_per_token_logps", log_probs)
        streams = self._reward_streams(completion_mask)
        if "ref_per_token_logps" in output:
            streams[-1] = -self.args.kl_coef * (old_log_probs - output["ref_per_token_logps"]) * completion_mask
        estimates = [
            gae(stream, value, completion_mask, self.args.gamma, self.args.gae_lambda)
            for stream, value in zip(streams, values.unbind(-1), strict=True)
        ]
        advantages = torch.stack([advantage for advantage, _ in estimates])
        output["state_returns"] = torch.stack([returns for _, returns in estimates], dim=-1)
        output["old_state_values"] = values
        output["advantages"] = self._mixed_advantages(advantages, completion_mask)
        self._record_rollout(streams[-1], completion_mask)
        return output

    def _score(self, output: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities `(B, T)` and values `(B, T, K+1)` of the completions, before any step on them."""
        recorder = ValueRecorder(self.model)
        input_ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention_mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        length = output["completion_ids"].size(1)
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            log_probs, _, _ = self._get_per_token_logps_and_entropies(
                recorder, input_ids, attention_mask, length, self.args.per_device_train_batch_size
            )
        return log_probs, recorder.values(length)

    def _reward_streams(self, completion_mask: torch.Tensor) -> torch.Tensor:
        """Rewards of every token, `(K+1, B, T)`: each reward at its last token, and the KL stream, empty."""
        rows, length = completion_mask.shape
        start = self.accelerator.process_index * rows
        rewards = self._rewards_per_func[start : start + rows]
        last = (completion_mask.cumsum(dim=1) * completion_mask).argmax(dim=1)
        streams = torch.zeros(rewards.size(1) + 1, rows, length, device=rewards.device)
        streams[:-1, torch.arange(rows), last] = rewards.t()
        return streams

    def _mixed_advantages(self, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rewards, kl = advantages[:-1], advantages[-1]
        weights = self.reward_weights.to(rewards)
        if self.multipliers is None:
            return whiten(torch.einsum("k,kbt->bt", weights, rewards) + kl, mask)
        if self.model.training:
            self.multipliers.update(self._rewards_per_func.mean(dim=0)[self._constrained].tolist())
        multiplier_weights = self.multipliers.weights()
        kinds = [constraint.kind for constraint in self.multipliers.constraints]
        signs = torch.tensor([-1.0 if kind == "<=" else 1.0 for kind in kinds]).to(rewards)
        objective = kl if self.args.objective == "kl" else torch.einsum("k,kbt->bt", weights, rewards) + kl
        constrained = signs.view(-1, 1, 1) * rewards[self._constrained]
        return mix_advantages(objective, constrained, multiplier_weights, mask, self.args.whiten_streams)

    def _record_rollout(self, kl_rewards: torch.Tensor, mask: torch.Tensor) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        if self.args.kl_coef > 0:
            sums = torch.stack([-kl_rewards.sum() / self.args.kl_coef, mask.sum().float(), mask.new_tensor(len(mask))])
            total, tokens, rows = self.accelerator.gather(sums.unsqueeze(0)).sum(dim=0).tolist()
            metrics["kl/per_token"].append(total / max(tokens, 1.0))
            metrics["kl/per_response"].append(total / rows)
        if self.multipliers is None:
            return
        weights, raw, violations = self.multipliers.weights(), self.multipliers.values(), self.multipliers.violations()
        for position, index in enumerate(self._constrained):
            name = self.reward_func_names[index]
            metrics[f"violation/{name}"].append(float(violations[position]))
            metrics[f"multiplier/{name}"].append(float(raw[position]))
            metrics[f"weight/{name}"].append(float(weights[position]))
        metrics["weight/objective"].append(len(weights) - float(weights.sum()))

    def _compute_loss(self, model, inputs):
        recorder = ValueRecorder(model)
        with self._without_kl_loss():
            policy_loss = super()._compute_loss(recorder, inputs)
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        values = recorder.values(mask.size(1))
        coefficients = values.new_full((values.size(-1),), self.args.vf_coef)
        coefficients[-1] = self.args.kl_vf_coef
        errors = clipped_value_loss(
            values, inputs["old_state_values"], inputs["state_returns"], self.args.cliprange_value
        )
        per_stream = (errors * mask.unsqueeze(-1)).sum(dim=(0, 1))
        self._record_critic(values.detach(), inputs["state_returns"], per_stream.detach(), mask)
        return policy_loss + (coefficients * per_stream).sum() / self._token_normalizer(inputs)

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

    def _record_critic(
        self, values: torch.Tensor, returns: torch.Tensor, per_stream: torch.Tensor, mask: torch.Tensor
    ) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        keep = mask.unsqueeze(-1)
        sums = torch.stack(
            [per_stream, (values * keep).sum((0, 1)), (returns * keep).sum((0, 1)), mask.sum().expand_as(per_stream)]
        )
        losses, means, targets, counts = self.accelerator.gather(sums.unsqueeze(0)).sum(dim=0)
        for index, name in enumerate([*self.reward_func_names, "kl"]):
            count = counts[index].clamp(min=1.0)
            metrics[f"critic/{name}/loss"].append((losses[index] / count).item())
            metrics[f"critic/{name}/value"].append((means[index] / count).item())
            metrics[f"critic/{name}/return"].append((targets[index] / count).item())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state = gathered_state_dict(self.critic)
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / CRITIC_FILE, metadata={"rewards": json.dumps(self.reward_func_names)})
            if self.multipliers is not None:
                (folder / MULTIPLIERS_FILE).write_text(json.dumps(self.multipliers.state_dict()))
        super().save_model(output_dir, _internal_call=_internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / CRITIC_FILE
        if not path.is_file():
            raise ValueError(
                f"The checkpoint {resume_from_checkpoint} has no {CRITIC_FILE}. Resume from a checkpoint of a "
                "`ConstrainedPPOTrainer`, or train from its weights without `resume_from_checkpoint`."
            )
        self.critic.load_state_dict(load_file(path))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.multipliers is not None:
            path = Path(checkpoint) / MULTIPLIERS_FILE
            if not path.is_file():
                raise ValueError(
                    f"The checkpoint {checkpoint} has no {MULTIPLIERS_FILE}: it was trained without constraints. "
                    "Resume with the settings of that run."
                )
            self.multipliers.load_state_dict(json.loads(path.read_text()))


class ValueRecorder:
    """
    Calls a model and keeps the values of its outputs, so that a subclass sees what `super()` computed.

    Args:
        model (`torch.nn.Module`):
            Policy with value heads, wrapped or not.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._values: list[torch.Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        self._values.append(output.state_values)
        return output

    def values(self, length: int) -> torch.Tensor:
        """Values of the last `length` tokens, `(B, length, K+1)`."""
        return torch.cat([values[:, -length:] for values in self._values])
