"""SparsePO's trainer. One batch's path:

SparsePOTrainer._compute_loss, in DPOTrainer.training_step
    _reference_input: the reference model runs, and reference_pass.read_reference keeps what the masks read
    super()._compute_loss: calls policy_forward.policy_forward in place of the policy's forward
        lm_head.paired_log_probs: log-probabilities of both models and KL(reference || policy), tile by tile
        masks.TokenMasks.forward: one weight for each response token in each of the two terms
        loss.sparse_po_terms: what TRL's code sums over a response and takes its loss of
    loss.mask_l1_penalty, loss.sft_loss and token_metrics: from the output of the same forward
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
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

from .._upstream import disable_gradient_checkpointing, use_adapter
from ..core.checkpointing import WholeCheckpointsMixin
from ..core.companion import CompanionMixin, extend_forward
from ..core.dropout import DroppedProbability, disable_dropout, stated_probabilities
from ..core.four_bits import keep_four_bits_trainable
from ..core.model_card import MethodCardMixin
from ..core.tokenizer_check import check_tokenizer
from ..optim.install import OwnOptimizerMixin
from .given_weights import WEIGHT_COLUMNS, TokenWeightsCollator, attach_token_weights
from .lm_head.paired_log_probs import take_kernel_of_hub
from .loss import length_desensitized_weights, mask_l1_penalty, sft_loss
from .mask_kinds import MASK_KINDS
from .masks import TokenMaskCompanion, TokenMasks
from .model_check import check_head, check_vocabularies, evaluating, probe_inputs, vocabulary_size
from .policy_forward import MaskedCausalLMOutput, ReferenceInput, policy_forward
from .preference_data import (
    ROW,
    check_preference_dataset,
    check_prepared_dataset,
    drop_pairs_without_signal,
)
from .reference_pass import (
    REFERENCE_ADAPTER,
    ReferenceCollector,
    ReferenceStates,
    decoder_layers,
    read_reference,
    reference_forward,
    reference_head,
)
from .report import CITATION, method_section
from .router_loss import check_router_loss
from .shared_prompts import check_shared_prompts, probe_pairs
from .sparse_po_config import SparsePOConfig


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


logger = get_logger(__name__)

# Kinds of masks that nothing but the reference model tells
REFERENCE_ONLY = ("learned", "activation", "ones")


class SparsePOTrainer(WholeCheckpointsMixin, CompanionMixin, MethodCardMixin, OwnOptimizerMixin, DPOTrainer):
    """
    Trainer for SparsePO (https://huggingface.co/papers/2410.05102): DPO whose token-level rewards and divergences are
    weighted by masks computed from the reference model.

    It takes [`~trl.DPOTrainer`]'s place: same constructor, same data, same reference model. TRL's loss code runs
    unchanged; the policy's forward hands it, in place of per-token log-probabilities, the terms of
    [`sparse_po_terms`] (see [`policy_forward`]).

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `PeftModel`):
            Policy, decoder-only. See [`~trl.DPOTrainer`].
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference model with the policy's vocabulary. Defaults to the model at the policy's `name_or_path`, or to
            the policy with its adapter switched off (or its `"ref"` adapter) under PEFT.
        args ([`SparsePOConfig`], *optional*):
            Configuration.
        data_collator (`DataCollator`, *optional*):
            As in [`~trl.DPOTrainer`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
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

    _tag_names = ["trl", "dpo", "trl_ext", "sparse-po"]
    _name = "SparsePO"
    _paper = {
        "title": "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks",
        "id": "2410.05102",
        "citation": CITATION,
    }
    _fixed_settings = ("optim", "mask_type", "independent_masks", "mask_reward", "mask_divergence")

    args: SparsePOConfig
    companion: TokenMaskCompanion
    data_collator: DataCollator
    _signature_columns: list[str] | None

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
        # TRL would take the SFT term of what the forward hands it, which is masked
        terms: list[tuple[str, float]] = list(zip(self.loss_types, self.loss_weights, strict=True))
        self._sft_weight = sum(weight for loss_type, weight in terms if loss_type == "sft")
        self.loss_weights: list[float] = [weight for loss_type, weight in terms if loss_type != "sft"]
        self.loss_types: list[str] = [loss_type for loss_type, _ in terms if loss_type != "sft"]
        self._warned_of_dead_masks = False
        self._compared_shared_prompts = not args.share_prompt
        self._reference: PreTrainedModel = (
            self.policy
            if self.ref_model is None
            else self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False)
        )
        take_kernel_of_hub(self.accelerator.device)
        check_tokenizer(self.processing_class, self.policy)
        check_vocabularies(
            (vocabulary_size(self.policy), vocabulary_size(self._reference)),
            None if ref_model is not None else self.policy.config.name_or_path,
        )
        keep_four_bits_trainable(self.model)
        self._dropped: list[DroppedProbability] = []
        if args.disable_dropout:
            self._dropped = [*disable_dropout(self.model), *disable_dropout(self._reference)]
        if args.mask_type == "given":
            self.data_collator = TokenWeightsCollator(self.data_collator)
        self._attach_masks()
        self._check_forward()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.args.mask_type == "given":
            self._signature_columns = list(dict.fromkeys([*(self._signature_columns or ()), *WEIGHT_COLUMNS]))

    def _attach_masks(self) -> None:
        reference, args = self._reference, self.args
        extend_forward(reference, partial(reference_forward, reference), compiled=args.torch_compile)
        masks = TokenMasks(
            num_layers=len(decoder_layers(reference)) if args.mask_type == "learned" else 0,
            hidden_size=reference.config.get_text_config().hidden_size,
            mask_type=args.mask_type,
            independent=args.independent_masks,
            mask_reward=args.mask_reward,
            mask_divergence=args.mask_divergence and args.divergence_coef > 0,
            init=args.mask_init,
            seed=args.seed,
        )
        self.attach_companion(
            TokenMaskCompanion(masks, args.mask_learning_rate, args.mask_weight_decay),
            partial(
                policy_forward, self.policy, args.divergence_coef, args.detach_chosen_divergence, args.share_prompt
            ),
        )

    def _check_forward(self) -> None:
        """Runs reference, and policy where it is another model, on a few tokens: what fails, fails here."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        models = [self._reference]
        if _family(self._reference) != _family(self.policy):
            models.append(self.policy)
        for model in models:
            owned = model is not self.policy and sharded  # an engine that runs already has the parameters
            partitioned = any(hasattr(p, "ds_id") or p.is_meta for p in model.parameters())
            if not owned and (partitioned or model.device.type != self.accelerator.device.type):
                logger.info(
                    f"{type(model).__name__} is not whole on {self.accelerator.device} before training starts, so its "
                    "head is not compared with SparsePO's."
                )
                return
            if owned:
                check_head(model, self.ref_model, self._reference_backbone)
            else:
                check_head(model)
            if self.args.share_prompt:
                inputs = probe_pairs(model, vocabulary_size(model))
                with evaluating(model):
                    check_shared_prompts(model, partial(self._last_states, inputs, model if not owned else None))
        if self.aux_loss_enabled and not sharded:
            inputs = probe_inputs(self.policy)
            with evaluating(self.policy):
                check_router_loss(self.policy, {name: inputs[name] for name in ("input_ids", "attention_mask")})
        # A mask that reads the policy waits for the engine that will have its parameters
        if self.args.mask_type in REFERENCE_ONLY or not (sharded or self.args.mask_type == "given"):
            with evaluating(self.model, self._reference):
                self._mask_weights(probe_inputs(self._reference), None)

    def _last_states(self, inputs: dict[str, Any], model: PreTrainedModel | None, share_prompt: bool) -> torch.Tensor:
        """Final states of some pairs' response tokens, of a model, or of the reference as training runs it."""
        if model is None:
            return self._run_reference(inputs, ReferenceCollector("ones", share_prompt))[0].hidden
        labels, kwargs = _labels(inputs), _model_inputs(inputs)
        with self.accelerator.autocast():
            return read_reference(model, "ones", labels, share_prompt=share_prompt, use_cache=False, **kwargs).hidden

    def _reference_backbone(self, input_ids: torch.Tensor, **inputs: Any) -> None:
        """Runs the reference model's backbone alone, through the engine that has its parameters."""
        self.ref_model(input_ids=input_ids, labels=input_ids, reference_collector=ReferenceCollector("ones"), **inputs)

    @property
    def masks(self) -> TokenMasks:
        """The masks, attached to the policy as its submodule `token_masks`."""
        return self.companion.module

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        dataset = check_preference_dataset(dataset, dataset_name, self._tokenizer)
        # Messages name rows of the user's data, and TRL drops some
        if (args.strict_pairs or args.mask_type == "given") and isinstance(dataset, Dataset):
            dataset = dataset.map(lambda _pair, row: {ROW: row}, with_indices=True)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(prepared, Dataset):
            check_prepared_dataset(dataset, prepared, dataset_name, args.max_length)
        if args.mask_type == "given":
            prepared = attach_token_weights(prepared, dataset_name, self._tokenizer)
        return drop_pairs_without_signal(
            prepared, dataset_name, args.max_length, args.truncation_mode == "keep_end", args.strict_pairs
        )

    def _reference_input(self, inputs: dict[str, Any]) -> ReferenceInput:
        kind = MASK_KINDS.get(self.args.mask_type)
        mask_type = self.args.mask_type if kind is None else kind.reads
        states, head = self._run_reference(inputs, ReferenceCollector(mask_type, self.args.share_prompt))
        return ReferenceInput(states, self._reference, head)

    def _run_reference(self, inputs: dict[str, Any], collector: ReferenceCollector) -> tuple[ReferenceStates, Any]:
        """The reference's states on a batch, and its head."""
        if self.ref_model is None:
            policy = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            adapter = use_adapter(policy, REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None)
            model = self.model
        else:
            adapter, model = nullcontext(), self.ref_model
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            adapter,
            # accelerate's own lies below the reference's wider forward, and the policy's runs in it as a whole
            self.accelerator.autocast(),
        ):
            model(**_model_inputs(inputs), labels=_labels(inputs), reference_collector=collector)
            head = reference_head(self._reference)
        assert collector.states is not None
        return collector.states, head

    def _compute_loss(self, model, inputs, return_outputs):
        inputs, given = _without_given_weights(inputs)
        if not self._compared_shared_prompts:
            # Once more on pairs of real length, for windows and blocks that a short sequence does not fill
            self._compared_shared_prompts = True
            with evaluating(self.model, self._reference):
                check_shared_prompts(self._reference, partial(self._last_states, inputs, None))
        num_pairs = inputs["input_ids"].size(0) // 2
        zeros = torch.zeros(num_pairs, device=inputs["input_ids"].device)
        masked_inputs = {
            **inputs,
            "reference": replace(self._reference_input(inputs), given=given),
            # The reference's log-probabilities are inside the per-token terms already
            "ref_chosen_logps": zeros,
            "ref_rejected_logps": zeros,
        }
        seen = []
        hook = model.register_forward_hook(lambda _model, _args, output: seen.append(output))
        self.precompute_ref_logps = True  # TRL then takes the reference's sums from the inputs
        try:
            result = super()._compute_loss(model, masked_inputs, return_outputs)
        finally:
            self.precompute_ref_logps = False
            hook.remove()
        loss, *rest = result if return_outputs else (result,)
        outputs = seen[0]  # TRL's deprecated `return_outputs` asks for plain logits with a second call
        if self.args.mask_l1_reward or self.args.mask_l1_divergence:
            loss = loss + mask_l1_penalty(
                outputs.reward_mask,
                outputs.divergence_mask,
                self.args.mask_l1_reward if self.masks.masks_reward else 0.0,
                self.args.mask_l1_divergence if self.masks.masks_divergence else 0.0,
                self.masks.is_common,
            )
        completion_mask = inputs["completion_mask"][:, 1:].bool()
        if self._sft_weight:
            loss = loss + self._sft_weight * sft_loss(outputs.policy_log_probs, completion_mask)
        self._record_token_metrics(outputs, completion_mask)
        self._check_finite(loss)
        return (loss, *rest) if return_outputs else loss

    def _record_token_metrics(self, outputs: MaskedCausalLMOutput, completion_mask: torch.Tensor) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        found = token_metrics(outputs, completion_mask, self.accelerator.gather, self.args.ld_alpha)
        for name, value in found.items():
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
        reward_mask, divergence_mask = self._mask_weights(*_without_given_weights(self._prepare_inputs(dict(inputs))))
        return {"reward": reward_mask, "divergence": divergence_mask}

    def _mask_weights(self, inputs: dict[str, Any], given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        reference = replace(self._reference_input(inputs), given=given)
        if self.args.mask_type in REFERENCE_ONLY:
            return self.masks(reference.states, inputs["completion_mask"][:, 1:].bool())
        with self.accelerator.autocast():
            output = self.model(
                **_model_inputs(inputs), labels=_labels(inputs), fused_lm_head=True, reference=reference
            )
        return output.reward_mask, output.divergence_mask

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with stated_probabilities(self._dropped):
            super().save_model(output_dir, _internal_call=_internal_call)

    def _method_section(self, model_id: str) -> str:
        return method_section(self.args, self.state.log_history, model_id)


def _family(model: PreTrainedModel) -> tuple[type, str | None]:
    """What decides whether a check of one model holds for another: its class, and its attention."""
    return type(model), model.config.get_text_config()._attn_implementation


def _model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """What a model's backbone is given of a batch."""
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}


def _labels(inputs: dict[str, Any]) -> torch.Tensor:
    """Token ids of a batch, -100 outside the completion."""
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)


def _without_given_weights(inputs: dict[str, Any]) -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor] | None]:
    """A batch as TRL's collator makes it, and the weights that came with it, each `(2B, T-1)`."""
    if "reward_weights" not in inputs:
        return inputs, None
    rest = {name: value for name, value in inputs.items() if name not in ("reward_weights", "divergence_weights")}
    return rest, (inputs["reward_weights"][:, 1:], inputs["divergence_weights"][:, 1:])


def token_metrics(
    outputs: MaskedCausalLMOutput,
    completion_mask: torch.Tensor,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ld_alpha: float | None = None,
) -> dict[str, float]:
    """
    Metrics that SparsePO adds to TRL's, from the per-token outputs of one batch.

    Args:
        outputs ([`MaskedCausalLMOutput`]):
            Output of the policy's forward, chosen rows first.
        completion_mask (`torch.Tensor` of shape `(2B, T-1)`, bool):
            Response tokens.
        gather (`Callable`, *optional*):
            Gathers a tensor over the processes along its first dimension.
        ld_alpha (`float`, *optional*):
            Weight in `logps/*` of the tokens past the shorter response's length, as in TRL.

    Returns:
        `dict[str, float]`: `logps/chosen` and `logps/rejected` (policy's sums, nats), `kl/chosen` and `kl/rejected`
        (KL(reference || policy) summed over a response, nats), and for each of the masks `mask/<term>/mean` (over
        response tokens), `mask/<term>/sparsity_chosen` and `_rejected` (share of tokens with weight zero, averaged
        over the sequences), and `mask/dead_sequences` (share of sequences where a mask is zero on every token).
    """
    assert outputs.policy_log_probs is not None and outputs.divergences is not None
    assert outputs.reward_mask is not None and outputs.divergence_mask is not None
    lengths = completion_mask.sum(dim=1).clamp_min(1)
    positions = length_desensitized_weights(completion_mask, 1.0 if ld_alpha is None else ld_alpha)
    per_sequence = {
        "logps": (outputs.policy_log_probs.detach() * positions).sum(dim=1),
        "kl": outputs.divergences.sum(dim=1),
    }
    dead = torch.zeros_like(lengths, dtype=torch.bool)
    for term, mask in (("reward", outputs.reward_mask.detach()), ("divergence", outputs.divergence_mask.detach())):
        zeros = ((mask == 0) & completion_mask).sum(dim=1)
        per_sequence[f"mask/{term}/sparsity"] = zeros / lengths
        per_sequence[f"mask/{term}/sum"] = mask.sum(dim=1)
        dead |= zeros == lengths
    columns = torch.stack([*(x.float() for x in per_sequence.values()), dead.float(), lengths.float()], dim=1)
    chosen, rejected = columns.chunk(2, dim=0)
    gathered = gather(torch.stack([chosen, rejected], dim=1)).mean(dim=0).tolist()
    values = {
        side: dict(zip([*per_sequence, "dead", "length"], row, strict=True))
        for side, row in zip(("chosen", "rejected"), gathered, strict=True)
    }
    num_tokens = values["chosen"]["length"] + values["rejected"]["length"]
    metrics = {f"{name}/{side}": values[side][name] for name in ("logps", "kl") for side in values}
    for term in ("reward", "divergence"):
        total = values["chosen"][f"mask/{term}/sum"] + values["rejected"][f"mask/{term}/sum"]
        metrics[f"mask/{term}/mean"] = total / num_tokens
        for side in values:
            metrics[f"mask/{term}/sparsity_{side}"] = values[side][f"mask/{term}/sparsity"]
    metrics["mask/dead_sequences"] = (values["chosen"]["dead"] + values["rejected"]["dead"]) / 2
    return metrics


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
        else model.config
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
    _check_adapters(model, peft_config)
    # TRL looks at the first row before it prepares the data
    if isinstance(train_dataset, Dataset | IterableDataset) and next(iter(train_dataset), None) is None:
        raise ValueError("The train dataset is empty. Give at least one pair with `chosen` and `rejected`.")
    alone = isinstance(model, PreTrainedModel) and peft_config is None and ref_model is None
    if alone and not config.name_or_path:
        raise ValueError(
            "`model` was not loaded from anywhere (its config has no `name_or_path`), so its reference model cannot "
            "be either. Pass `ref_model=copy.deepcopy(model)`."
        )
    # Before anything is loaded; the heads themselves are compared later
    ref_config = ref_model.config if isinstance(ref_model, PreTrainedModel) else None
    if alone:
        ref_config = AutoConfig.from_pretrained(config.name_or_path, trust_remote_code=args.trust_remote_code)
    if ref_config is not None:
        sizes = (config.get_text_config().vocab_size, ref_config.get_text_config().vocab_size)
        check_vocabularies(sizes, config.name_or_path if alone else None)


def _check_adapters(model: Any, peft_config: Any) -> None:
    configs = {"peft_config": peft_config} if peft_config is not None else {}
    configs |= {
        f"model.peft_config[{name!r}]": config for name, config in (getattr(model, "peft_config", {}) or {}).items()
    }
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"`{name}` is prompt learning ({config.peft_type}), whose virtual tokens have no counterpart in the "
                "reference pass. Use an adapter such as `LoraConfig`."
            )
        if getattr(config, "bias", "none") not in ("none", None):
            raise ValueError(
                f"`{name}` has `bias={config.bias!r}`, which trains biases of the base model itself: the reference, "
                "the policy with its adapter switched off, would move with them. Set `bias='none'`."
            )
