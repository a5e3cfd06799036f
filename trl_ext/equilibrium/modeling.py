"""Sequence classifiers and reward models with an equilibrium-propagation head, in transformers' form.

One forward: the backbone, [`pooled_states`], [`EPHead.forward`], then the loss of `problem_type`, to which
`homeostasis_coef` times the homeostasis objective is added. Importing this module registers the model with
transformers' auto classes ([`register_auto_classes`]).
"""

import copy
import logging
import warnings
from collections import Counter
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from .configuration import TOKEN_IDS, EPConfig, PoolingName
from .head import EPHead
from .loading import (
    CONFIG_FIELDS,
    HEAD_FIELDS,
    LABEL_FIELDS,
    backbone_in_memory,
    find_adapter,
    label_settings,
    load_adapter,
    place_head,
    save_configuration,
    saved_configuration,
    without_unused_pooler,
)


# What quantized models of transformers carry, which trainers and PEFT ask for
_QUANTIZATION = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
# How encoders' own classifiers say what they pool
_CLASSIFIER_POOLING: dict[str, PoolingName] = {"cls": "first", "mean": "mean"}


@dataclass
class EPSequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """
    transformers' output with the homeostasis objective, of shape `(1,)`, float32, in training and where
    `homeostasis_coef` is above 0. `loss` has it already, weighted.
    """

    homeostasis_loss: torch.Tensor | None = None


class EPModelForSequenceClassification(PreTrainedModel):
    """
    Any backbone with an [`EPHead`] named `score` on its pooled state (https://huggingface.co/papers/2309.02214): that
    of the last token that is not padding, or for encoders such as BERT of the first, see `pooling` of [`EPConfig`].

    Classification, regression and several labels at once, as `problem_type` says, and reward models with
    `num_labels=1`. Saved and loaded as any model of transformers;
    [`~transformers.AutoModelForSequenceClassification`] loads it too once this class has been imported.

    Args:
        config ([`EPConfig`]):
            Configuration.
        backbone ([`~transformers.PreTrainedModel`], *optional*):
            Model without a head. Defaults to one with new weights.

    Raises:
        TypeError: If `config` is not an [`EPConfig`].
        ValueError: If an argument of the head is wrong, the backbone has an encoder and a decoder, or `pooling` asks
            for a pooler and it has none.

    Example:

    ```python
    from trl_ext import EPModelForSequenceClassification

    model = EPModelForSequenceClassification.from_pretrained("Qwen/Qwen3-0.6B", num_labels=1)
    model.save_pretrained("Qwen3-0.6B-EP-Reward")
    ```
    """

    config_class = EPConfig
    config: EPConfig
    base_model_prefix = "model"
    # Its loss is a mean over the rows of a batch, so a trainer has to divide by the number of accumulated batches
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["score"]
    # Of heads that were saved when the cap of each weight had a subspace
    _keys_to_ignore_on_load_unexpected = [r"_subspace$"]

    def __init__(self, config: EPConfig, backbone: PreTrainedModel | None = None):
        if not isinstance(config, EPConfig):
            raise TypeError(
                f"`config` must be an `EPConfig`, got `{type(config).__name__}`. Give `EPConfig(text_config=config)`, "
                "or use `EPModelForSequenceClassification.from_backbone`."
            )
        super().__init__(config)
        if config.get_text_config().is_encoder_decoder:
            raise ValueError(
                f"The backbone `{config.text_config.model_type}` has an encoder and a decoder. Use one of the two, or "
                "a decoder-only model."
            )
        self.num_labels = config.num_labels
        self.pooling: PoolingName = config.pooling or default_pooling(config.get_text_config())
        backbone = AutoModel.from_config(config.text_config) if backbone is None else backbone
        self.model = without_unused_pooler(backbone, self.pooling)
        hidden_size = config.get_text_config().hidden_size
        self.score = EPHead(hidden_size, out_features=self.num_labels, **config.head_settings())
        self._backward_passes: Counter[str] = Counter()
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """
        Loads a saved model; an adapter that was trained on one, with its base model; or a backbone, which gets a new
        head.

        Args:
            pretrained_model_name_or_path (`str`):
                Model id or folder of a model, an adapter or a backbone.
            config (`PreTrainedConfig` or `str`, *optional*):
                Configuration, or where it is saved: an [`EPConfig`], or that of a backbone, whose labels and
                `problem_type` are then the model's. Defaults to the saved one.
            model_args (`Any`):
                Handed on.
            kwargs (`Any`):
                Those of transformers' `from_pretrained`, and fields of [`EPConfig`].

        Returns:
            [`EPModelForSequenceClassification`], in evaluation mode; with `output_loading_info=True` a pair of it and
            a `dict` of missing, unexpected and mismatched keys.

        Raises:
            ValueError: If an adapter's head, its settings or its base model are saved nowhere.
        """
        source = pretrained_model_name_or_path
        if isinstance(config, (str, PathLike)):
            config = AutoConfig.from_pretrained(config)
        adapter = find_adapter(source, kwargs)
        if adapter is not None:
            return load_adapter(cls, source, adapter, config, kwargs)
        own = EPConfig.model_type
        saved = own if source is None else saved_configuration(source, kwargs).get("model_type")
        is_own = saved == own if config is None else isinstance(config, EPConfig) and saved in (own, None)
        if not is_own:
            return cls.from_backbone(source, config=config, **kwargs)
        return super().from_pretrained(source, *model_args, config=config, **kwargs)

    @classmethod
    def from_backbone(cls, backbone: Any, *, config: PreTrainedConfig | None = None, **kwargs: Any) -> Any:
        """
        Puts a new head on a backbone.

        Args:
            backbone (`str`, [`~transformers.PreTrainedModel`] or `PeftModel`):
                Model id or folder, or a model, whose own head is left out. A model in memory stays as it is and keeps
                its mode, which the new model takes over; the two share the backbone's weights. Of a `PeftModel`, the
                backbone is a copy with the adapter merged into it.
            config (`PreTrainedConfig`, *optional*):
                An [`EPConfig`], whose settings are taken, or with a model id the backbone's configuration.
            kwargs (`Any`):
                Fields of [`EPConfig`]; with a model id, also those of transformers' `from_pretrained`. Labels and
                `problem_type` default to those of the backbone's configuration.

        Returns:
            [`EPModelForSequenceClassification`], of a model id in evaluation mode; with `output_loading_info=True` as
            [`~EPModelForSequenceClassification.from_pretrained`].

        Raises:
            ValueError: If a model is given and `kwargs` has something that is no field of [`EPConfig`], or the numbers
                of labels given differ.
        """
        given = {name: kwargs.pop(name) for name in CONFIG_FIELDS if name in kwargs}
        head = {name: given[name] for name in HEAD_FIELDS if name in given}
        if isinstance(config, EPConfig):
            head = {name: getattr(config, name) for name in HEAD_FIELDS} | head
        info: dict[str, Any] | None = None
        if isinstance(backbone, nn.Module):
            if kwargs:
                raise ValueError(f"{sorted(kwargs)} are no fields of `EPConfig`. Its fields are {CONFIG_FIELDS}.")
            backbone = backbone_in_memory(backbone)
            name, text_config = backbone.config.name_or_path, copy.deepcopy(backbone.config)
        else:
            name = str(backbone)
            if config is not None:
                kwargs["config"] = config.text_config if isinstance(config, EPConfig) else config
            backbone = AutoModel.from_pretrained(backbone, **kwargs)
            if kwargs.get("output_loading_info"):
                backbone, info = backbone
            text_config = backbone.config
        labels = {name: given[name] for name in LABEL_FIELDS if name in given}
        labels = label_settings(config if isinstance(config, EPConfig) else backbone.config, labels)
        # Implementations are set for all parts at once when a model is built: keep those that the backbone has
        implementations = {
            name: {"text_config": getattr(backbone.config, f"_{name}")}
            for name in ("attn_implementation", "experts_implementation")
        }
        own = EPConfig(text_config=text_config, dtype=backbone.dtype, **implementations, **head, **labels)
        for token in TOKEN_IDS:
            if token in given:
                setattr(own, token, given[token])
        # Where trainers look for the tokenizer, and model cards for the name of the base model
        own.name_or_path = name
        model = cls(own, backbone=backbone)
        model.training = backbone.training
        model.score.train(backbone.training)
        place_head(model, backbone)
        if getattr(backbone, "is_quantized", False):
            own.quantization_config = backbone.config.quantization_config
            for name in _QUANTIZATION:
                if hasattr(backbone, name):
                    setattr(model, name, getattr(backbone, name))
        return model if info is None else (model, _with_head_missing(info, model.score))

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As transformers saves; with an adapter loaded, the configuration is saved beside it."""
        super().save_pretrained(save_directory, **kwargs)
        if getattr(self, "peft_config", None) and kwargs.get("is_main_process", True):
            save_configuration(self, save_directory)

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, EPHead):
            super()._init_weights(module)
            return
        for name, values in module.initial_parameters().items():
            # Leaves alone what was loaded
            initialization.copy_(getattr(module, name), values)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> EPSequenceClassifierOutput | tuple[Any, ...]:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
                Tokens.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                1 where a token is not padding.
            position_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
                Positions.
            past_key_values (`Cache`, *optional*):
                Cache of the backbone.
            inputs_embeds (`torch.Tensor` of shape `(B, T, H)`, *optional*):
                Embeddings in place of `input_ids`.
            labels (`torch.Tensor`, *optional*):
                Classes `(B,)`, or values `(B,)` or `(B, num_labels)` for regression, or zeros and ones
                `(B, num_labels)` for several labels at once.
            use_cache (`bool`, *optional*):
                Whether the backbone returns its cache.
            return_dict (`bool`, *optional*):
                Whether to return an output object, the default, or a tuple.
            kwargs (`Any`):
                Handed to the backbone.

        Returns:
            [`EPSequenceClassifierOutput`] with `logits` of shape `(B, num_labels)`, float32.
        """
        given = {"position_ids": position_ids, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds,
                 "use_cache": use_cache}  # fmt: skip
        kwargs |= {name: value for name, value in given.items() if value is not None}
        outputs = self.model(input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        pad_token_id = self.config.get_text_config().pad_token_id
        pooled = pooled_states(outputs, self.pooling, input_ids, attention_mask, pad_token_id)
        logits, homeostasis_loss = self._score(pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
            if homeostasis_loss is not None:
                loss = loss + self.config.homeostasis_coef * homeostasis_loss.squeeze()
        output = EPSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            past_key_values=getattr(outputs, "past_key_values", None),
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),  # a state-space model has none
            homeostasis_loss=homeostasis_loss,
        )
        return output.to_tuple() if return_dict is False else output

    def _score(self, pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        # In float32 whatever the backbone's dtype, since the head computes in it
        logits = self.score(pooled.float())
        if not (self.training and self.config.homeostasis_coef > 0 and torch.is_grad_enabled()):
            return logits, None
        homeostasis_loss = self.score.homeostasis_loss().reshape(1)
        self._watch(logits, homeostasis_loss)
        return logits, homeostasis_loss

    def _watch(self, logits: torch.Tensor, homeostasis_loss: torch.Tensor) -> None:
        """Warns, once, where earlier losses had the logits and never the objective, as a stock trainer's do."""
        passes = self._backward_passes
        if passes["logits"] and not passes["homeostasis_loss"]:
            passes["homeostasis_loss"] = 1
            warnings.warn(
                f"`homeostasis_coef={self.config.homeostasis_coef}` has no effect: the trainer's loss leaves out "
                "`outputs.homeostasis_loss`. Train reward models with `trl_ext.EPRewardTrainer`, or pass `labels`, or "
                "add `homeostasis_coef * outputs.homeostasis_loss` to your loss.",
                stacklevel=4,
            )
        for name, tensor in (("logits", logits), ("homeostasis_loss", homeostasis_loss)):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, name=name: passes.update([name]))


def equilibrium_model(model: nn.Module) -> EPModelForSequenceClassification:
    """The classifier itself, without an adapter's wrapper; refuses a model that has no equilibrium head."""
    found: Any = model
    if is_peft_model(model):
        found = found.get_base_model()
    if not isinstance(found, EPModelForSequenceClassification):
        raise TypeError(
            f"`model` is a `{type(found).__name__}`, which has no equilibrium head. Give an "
            "`EPModelForSequenceClassification`; `EPModelForSequenceClassification.from_backbone(model)` makes one."
        )
    return found


def active_head(model: nn.Module) -> EPHead:
    """The head that runs: under PEFT's `modules_to_save=["score"]`, the active adapter's copy."""
    score: Any = equilibrium_model(model).score
    return score if isinstance(score, EPHead) else score.modules_to_save[score.active_adapter]


def default_pooling(config: PreTrainedConfig) -> PoolingName:
    """
    How transformers' own classifier on a backbone pools: encoders, that is those which transformers trains with masked
    tokens, as their `classifier_pooling` says, which ModernBERT has, or else `"first"`; all others `"last"`.
    """
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if not is_encoder:
        return "last"
    return _CLASSIFIER_POOLING.get(getattr(config, "classifier_pooling", None) or "cls", "first")


def _with_head_missing(info: dict[str, Any], head: nn.Module) -> dict[str, Any]:
    """Loading information of a model whose backbone was loaded, in the model's own names, and whose head is new."""
    own = {name: {f"model.{key}" for key in info[name]} for name in ("missing_keys",) if name in info}
    own["missing_keys"] = own.get("missing_keys", set()) | {f"score.{name}" for name in head.state_dict()}
    return {**info, **own}


def last_token_states(hidden: torch.Tensor, input_ids: torch.Tensor | None, pad_token_id: int | None) -> torch.Tensor:
    """
    `(B, H)`, the state of the last token of each row that is not padding, left or right, as transformers' classifiers
    pool; without `input_ids`, of the last position. Several rows need a padding token.
    """
    rows = torch.arange(len(hidden), device=hidden.device)
    if pad_token_id is None and len(hidden) > 1:
        raise ValueError(f"A batch of {len(hidden)} rows needs a padding token. Set `model.config.pad_token_id`.")
    if pad_token_id is None or input_ids is None:
        return hidden[:, -1]
    is_token = (input_ids != pad_token_id).to(hidden.device, torch.int32)
    positions = torch.arange(input_ids.size(1), device=hidden.device, dtype=torch.int32)
    return hidden[rows, (positions * is_token).argmax(-1)]


def pooled_states(
    outputs: Any,
    pooling: PoolingName,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    pad_token_id: int | None = None,
) -> torch.Tensor:
    """
    One state for each row, `(B, H)`, of a backbone's outputs, pooled as [`EPConfig`] says. Padding is what
    `attention_mask` says, or, without one and for `"last"`, tokens equal to `pad_token_id`.
    """
    if pooling == "pooler":
        return outputs.pooler_output
    hidden = outputs.last_hidden_state
    if pooling == "last":
        return last_token_states(hidden, input_ids, pad_token_id)
    mask = hidden.new_ones(hidden.shape[:2])
    if attention_mask is not None and attention_mask.dim() == 2:
        mask = attention_mask.to(hidden)
    elif input_ids is not None and pad_token_id is not None:
        mask = (input_ids != pad_token_id).to(hidden)
    if pooling == "first":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.argmax(dim=1)]
    # In float32: a sum over many tokens overflows or is rounded in half precision
    mask = mask.float().unsqueeze(-1)
    return (hidden.float() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)


def register_auto_classes() -> None:
    """
    Makes transformers' `AutoConfig` and `AutoModelForSequenceClassification`, and what is built on them, such as
    `pipeline` and reward models of TRL's trainers that are given by name, load models with an equilibrium head. The
    first import of [`EPConfig`] or [`EPModelForSequenceClassification`] does this; a second call changes nothing.
    """
    AutoConfig.register(EPConfig.model_type, EPConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(EPConfig, EPModelForSequenceClassification, exist_ok=True)


def unregister_auto_classes() -> None:
    """Undoes [`register_auto_classes`]."""
    from .._upstream import remove_from_auto_classes

    remove_from_auto_classes(EPConfig, AutoModelForSequenceClassification)


def _register_on_import() -> None:
    """The classes work without registration: a failure is logged, and no import fails of it."""
    try:
        register_auto_classes()
    except Exception:
        message = "transformers' auto classes did not take the equilibrium model: load it by its own class."
        logging.getLogger(__name__).warning(message, exc_info=True)


_register_on_import()
