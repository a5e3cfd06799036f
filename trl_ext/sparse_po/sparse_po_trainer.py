from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction
from trl import DPOTrainer

from .._upstream import SyncRefModelCallback, disable_gradient_checkpointing, gathered_state_dict, use_adapter
from ..core.model_card import MethodCardMixin
from ..core.parameter_groups import move_to_own_groups
from .card import CITATION, method_section
from .loss import mask_l1_penalty
from .mask_checkpoint import load_masks, save_masks
from .masked_forward import TOKEN_MASKS, MaskedCausalLMOutput, ReferenceInput, TokenMasks, add_token_masks
from .metrics import token_metrics
from .preference_data import check_preference_dataset, check_prepared_dataset
from .reference_states import ReferenceCollector, ReferenceStates, decoder_layers, original_head
from .sparse_po_config import SparsePOConfig


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


logger = get_logger(__name__)


class SparsePOTrainer(MethodCardMixin, DPOTrainer):
    """
    Trainer for SparsePO (https://huggingface.co/papers/2410.05102): DPO whose token-level rewards and divergences are
    weighted by masks computed from the reference model.

    It takes [`~trl.DPOTrainer`]'s place: same constructor, same data, same reference model. TRL's loss code runs
    unchanged; the policy's forward hands it, in place of per-token log-probabilities, the terms of
    [`sparse_po_terms`] (see [`add_token_masks`]).

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `PeftModel`):
            Policy, decoder-only. See [`~trl.DPOTrainer`].
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference model with the policy's vocabulary. Defaults to a copy of the policy, or to the policy with its
            adapter switched off (or its `"ref"` adapter) under PEFT.
        args ([`SparsePOConfig`], *optional*):
            Configuration.
        data_collator (`DataCollator`, *optional*):
            As in [`~trl.DPOTrainer`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference data, plain or conversational.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Preference data.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer.
        compute_metrics (`Callable`, *optional*):
            As in [`~trl.DPOTrainer`].
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler. Learned masks are added to the optimizer as groups of their own.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            As in [`~trl.DPOTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            As in [`~trl.DPOTrainer`]; prompt learning is not supported.

    Raises:
        TypeError: If `args` is not a [`SparsePOConfig`].
        ValueError: If the model is no decoder-only text model, or policy and reference differ in vocabulary.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ext import SparsePOConfig, SparsePOTrainer

    trainer = SparsePOTrainer(
        model="Qwen/Qwen3-0.6B",
        args=SparsePOConfig(beta=0.1, independent_masks=True),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "trl_ext", "sparse-po"]
    _name = "SparsePO"
    _paper = {
        "title": "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks",
        "id": "2410.05102",
        "citation": CITATION,
    }

    args: SparsePOConfig

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: SparsePOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: "PeftConfig | None" = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else model.config.name_or_path
            args = SparsePOConfig(f"{model_name.rstrip('/').split('/')[-1] or 'policy'}-SparsePO")
        _check_arguments(model, ref_model, args, train_dataset, processing_class, peft_config)
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._warned_of_dead_masks = False
        self._attach_masks()
        if args.sync_ref_model:
            self.remove_callback(SyncRefModelCallback)
            self.add_callback(SyncRefModelWithoutMasks(ref_model=self.ref_model, accelerator=self.accelerator))

    def _attach_masks(self) -> None:
        base = self._base_model(self.model)
        reference = base if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        masks = TokenMasks(
            num_layers=len(decoder_layers(reference)),
            hidden_size=reference.config.get_text_config().hidden_size,
            mask_type=self.args.mask_type,
            independent=self.args.independent_masks,
            mask_reward=self.args.mask_reward,
            mask_divergence=self.args.mask_divergence and self.args.divergence_coef > 0,
            init=self.args.mask_init,
            seed=self.args.seed,
        )
        masks.to(base.device)
        add_token_masks(base, masks, self.args.divergence_coef, self.args.detach_chosen_divergence)
        if self.ref_model is not None:
            add_token_masks(reference)
        names = {f"{TOKEN_MASKS}.{name}" for name, _ in masks.named_parameters()}
        base._keys_to_ignore_on_save = set(base._keys_to_ignore_on_save or ()) | names
        if names and self.is_deepspeed_enabled:
            plugin = self.accelerator.state.deepspeed_plugin
            if "optimizer" in plugin.deepspeed_config:
                raise ValueError(
                    "The DeepSpeed config has an `optimizer` block, which would train the masks at the policy's "
                    "learning rate and weight decay. Remove the block: the optimizer then comes from `optim`."
                )

    @staticmethod
    def _base_model(model: Any) -> PreTrainedModel:
        return model.get_base_model() if is_peft_model(model) else model

    @property
    def masks(self) -> TokenMasks:
        """The masks, attached to the policy as its submodule `token_masks`."""
        return getattr(self._base_model(self.accelerator.unwrap_model(self.model)), TOKEN_MASKS)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        dataset = check_preference_dataset(dataset, dataset_name, args.drop_invalid_pairs)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(prepared, Dataset):
            check_prepared_dataset(dataset, prepared, dataset_name, args.max_length)
        return prepared

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        masks = [module for name, module in self._named_masks(self.model if model is None else model)]
        decayed = [parameter for mask in masks for parameter in mask.decayed_parameters()]
        others = [p for mask in masks for p in mask.parameters() if all(p is not other for other in decayed)]
        learning_rate = self.args.mask_learning_rate
        move_to_own_groups(
            optimizer,
            [(decayed, self.args.mask_weight_decay), (others, 0.0)],
            self.args.learning_rate if learning_rate is None else learning_rate,
            tag="token_masks",
        )
        return optimizer

    @staticmethod
    def _named_masks(model: nn.Module) -> list[tuple[str, Any]]:
        return [(n, m) for n, m in model.named_modules() if f"{TOKEN_MASKS}.learned." in n]

    def _reference_states(self, inputs: dict[str, Any]) -> ReferenceStates:
        """Runs the reference model on the batch, without gradient."""
        collector = ReferenceCollector(self.args.mask_type)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        model_inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        if self.ref_model is None:
            policy = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
            model = self.model
        else:
            adapter, model = nullcontext(), self.ref_model
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            adapter,
        ):
            model(**model_inputs, labels=labels, reference_collector=collector)
        return collector.states

    def _reference_input(self, inputs: dict[str, Any]) -> ReferenceInput:
        states = self._reference_states(inputs)
        if self.ref_model is None:
            reference = self._base_model(self.accelerator.unwrap_model(self.model))
        else:
            reference = self.accelerator.unwrap_model(self.ref_model)
        return ReferenceInput(states, reference, original_head(reference.get_output_embeddings()))

    def _compute_loss(self, model, inputs, return_outputs):
        num_pairs = inputs["input_ids"].size(0) // 2
        zeros = torch.zeros(num_pairs, device=inputs["input_ids"].device)
        recorder = OutputRecorder(model)
        masked_inputs = {
            **inputs,
            "reference": self._reference_input(inputs),
            # The reference's log-probabilities are inside the per-token terms already
            "ref_chosen_logps": zeros,
            "ref_rejected_logps": zeros,
        }
        with self._reference_sums_from_inputs():
            result = super()._compute_loss(recorder, masked_inputs, return_outputs)
        loss, *rest = result if return_outputs else (result,)
        outputs = recorder.outputs
        if self.args.mask_l1_reward or self.args.mask_l1_divergence:
            loss = loss + mask_l1_penalty(
                outputs.reward_mask,
                outputs.divergence_mask,
                self.args.mask_l1_reward if self.masks.masks_reward else 0.0,
                self.args.mask_l1_divergence if self.masks.masks_divergence else 0.0,
                self.masks.is_common,
            )
        self._record_token_metrics(outputs, inputs["completion_mask"][:, 1:].bool())
        self._check_finite(loss)
        return (loss, *rest) if return_outputs else loss

    @contextmanager
    def _reference_sums_from_inputs(self) -> Iterator[None]:
        self.precompute_ref_logps = True
        try:
            yield
        finally:
            self.precompute_ref_logps = False

    def _record_token_metrics(self, outputs: MaskedCausalLMOutput, completion_mask: torch.Tensor) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in token_metrics(outputs, completion_mask, self.accelerator.gather).items():
            if name.startswith("logps/"):
                metrics[name].pop()  # TRL recorded the sum of the masked terms under this name
            metrics[name].append(value)
        if metrics["mask/dead_sequences"][-1] > 0 and not self._warned_of_dead_masks:
            self._warned_of_dead_masks = True
            logger.warning(
                f"In {metrics['mask/dead_sequences'][-1]:.0%} of the sequences of a batch a token mask is zero on "
                "every response token, so they give no gradient. If `mask/dead_sequences` stays high, lower "
                "`mask_learning_rate` and the L1 weights, or use `mask_init='positive'`."
            )

    def _check_finite(self, loss: torch.Tensor) -> None:
        if self.model.training and not torch.isfinite(self.accelerator.gather(loss.detach().reshape(1))).all():
            raise FloatingPointError(
                f"The loss is not finite at step {self.state.global_step + 1}. Training stops before the weights "
                f"change; the last checkpoint in {self.args.output_dir} is kept. Lower `learning_rate` "
                f"({self.args.learning_rate}) or `mask_learning_rate`, clip with `max_grad_norm`, or check the data, "
                "then resume from that checkpoint."
            )

    @torch.no_grad()
    def token_masks(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """
        Weights of the response tokens of a batch.

        Under ZeRO-3 and FSDP all processes must call it.

        Args:
            inputs (`dict`):
                Collated batch with `input_ids`, `attention_mask` and `completion_mask`, each `(2B, T)`, chosen first.

        Returns:
            `dict[str, torch.Tensor]`: `"reward"` and `"divergence"`, each `(2B, T-1)`, float32, zero outside the
            completion. Column `t` weights token `t + 1`.
        """
        inputs = self._prepare_inputs(dict(inputs))
        with self.accelerator.autocast():
            states = self._reference_states(inputs)
        predicted = inputs["completion_mask"][:, 1:].bool()
        reward_mask, divergence_mask = self.masks(states, predicted)
        return {"reward": reward_mask, "divergence": divergence_mask}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state = gathered_state_dict(self.masks.learned)
        folder = self.args.output_dir if output_dir is None else output_dir
        if state and self.args.should_save:
            save_masks(state, folder, self.masks)
        super().save_model(output_dir, _internal_call=_internal_call)

    def _method_section(self, model_id: str) -> str:
        return method_section(self.args, self.state.log_history, model_id)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Masks first: a checkpoint without them is refused before anything is overwritten
        if not self.is_fsdp_enabled:
            load_masks(self.masks, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            load_masks(self.masks, self.state.best_model_checkpoint)


class OutputRecorder:
    """
    Calls a model and keeps the first output, so that a subclass sees what `super()._compute_loss` saw.

    Args:
        model (`torch.nn.Module`):
            Policy, wrapped or not.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.outputs: MaskedCausalLMOutput | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.outputs is None:
            self.outputs = self.model(*args, **kwargs)
            return self.outputs
        # TRL's deprecated `return_outputs` asks for plain logits with a second call
        kwargs.pop("reference", None)
        return self.model(*args, **kwargs)


class SyncRefModelWithoutMasks(SyncRefModelCallback):
    """TRL's synchronisation of the reference model, over the policy's parameters without the masks."""

    @staticmethod
    def sync_target_model(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
        SyncRefModelCallback.sync_target_model(_ParametersWithoutMasks(model), target_model, alpha)


class _ParametersWithoutMasks:
    def __init__(self, model: nn.Module):
        self.model = model

    def parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if f"{TOKEN_MASKS}." not in name]


def _check_arguments(
    model: Any, ref_model: Any, args: Any, train_dataset: Any, processing_class: Any, peft_config: Any
) -> None:
    if not isinstance(args, SparsePOConfig):
        raise TypeError(
            f"`args` must be a `SparsePOConfig`, got `{type(args).__name__}`. Every field of `DPOConfig` exists there "
            "under the same name: replace the class."
        )
    config = (
        AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code)
        if isinstance(model, str)
        else (model.config)
    )
    if config.is_encoder_decoder:
        raise ValueError(
            f"`model` is an encoder-decoder ({config.model_type}), and SparsePO's masks are defined for decoder-only "
            "language models. Use a causal language model."
        )
    if isinstance(processing_class, ProcessorMixin) or (
        isinstance(train_dataset, Dataset) and {"image", "images"} & set(train_dataset.column_names)
    ):
        raise ValueError(
            "`processing_class` or `train_dataset` is of a vision-language model, which SparsePO does not support: "
            "the masks are defined on text tokens. Pass a tokenizer and a dataset without `image` or `images`."
        )
    if peft_config is not None and getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"`peft_config` is prompt learning ({peft_config.peft_type}), whose virtual tokens have no counterpart in "
            "the reference pass. Use an adapter such as `LoraConfig`."
        )
    if isinstance(ref_model, PreTrainedModel):
        sizes = [c.get_text_config().vocab_size for c in (config, ref_model.config)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"`model` has a vocabulary of {sizes[0]} tokens and `ref_model` of {sizes[1]}: the token-level "
                "divergence needs one vocabulary. Resize the embeddings of one of them, or leave out `ref_model`."
            )
