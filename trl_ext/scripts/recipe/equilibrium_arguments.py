"""Arguments that the scripts of the equilibrium-propagation head share, and the model they describe."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ...core.checks import Range, check_fields
from ...equilibrium.settings import (
    RANGES,
    HeadSettings,
    check_head,
    check_homeostasis,
    check_spectral_cap,
    head_settings,
    read_spectral_cap,
)
from .reading import RecipeError
from .stand_ins import prefixed
from .tokenizer import TOKENIZER_RANGES, TokenizerArguments


PREFIX = "head_"
_SCRIPT_RANGES = {"show_alignment": Range(at_least=0), **TOKENIZER_RANGES}


# The parser reads lists
_PrefixedHeadSettings: Any = prefixed(HeadSettings, PREFIX, ("hidden_features",))


@dataclass
class EPHeadArguments(TokenizerArguments, _PrefixedHeadSettings):
    """
    The head, and whether the backbone trains.

    Args:
        head_* (`Any`, *optional*):
            Every field of [`HeadSettings`](../../equilibrium/settings.py), with the prefix.
        tokenizer_name_or_path (`str`, *optional*):
            Name or folder of the tokenizer. Defaults to the model's own.
        pooling (`str`, *optional*):
            State that the head reads: `"last"`, `"first"`, `"mean"` or `"pooler"`. Defaults to the last token's for
            decoders and, for encoders, to what their configuration says or the first token's.
        freeze_backbone (`bool`, *optional*, defaults to `False`):
            Whether only the head trains.
        show_alignment (`int`, *optional*, defaults to `0`):
            Number of evaluation examples on which estimated and exact gradients are compared through training, as a
            picture ([`~trl_ext.EPAlignmentCallback`]).
    """

    pooling: Literal["last", "first", "mean", "pooler"] | None = field(
        default=None, metadata={"help": "State that the head reads: 'last', 'first', 'mean' or 'pooler'."}
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the head only."})
    show_alignment: int = field(
        default=0, metadata={"help": "Evaluation examples on which the gradient is compared with the exact one."}
    )

    def __post_init__(self) -> None:
        self.head_spectral_cap: Any = read_spectral_cap(self.head_spectral_cap)
        own = {f"{PREFIX}{name}": within for name, within in RANGES.items()}
        check_fields(self, {**own, f"{PREFIX}hidden_features": Range(at_least=1, empty=False), **_SCRIPT_RANGES})
        check_spectral_cap(self, f"{PREFIX}spectral_cap")

    def head_settings(self) -> dict[str, Any]:
        """The head's settings under the names of [`~trl_ext.EPConfig`]."""
        return head_settings(self, PREFIX)


def check_head_arguments(head_args: EPHeadArguments, homeostasis_coef: float | None) -> None:
    """
    Refuses a head that cannot be built, before a model or data is loaded.

    Args:
        head_args ([`EPHeadArguments`]):
            The head.
        homeostasis_coef (`float` or `None`):
            Weight of the homeostasis objective.

    Raises:
        RecipeError: If an argument of the head is wrong.
    """
    try:
        check_head(head_args, PREFIX)
        check_homeostasis(homeostasis_coef or 0.0, head_args.head_settings()["feedback"])
    except ValueError as error:
        # The homeostasis objective has no prefix, the feedback that it names has
        raise RecipeError(str(error).replace("`feedback=", f"`{PREFIX}feedback=")) from error


def load_model(model_args: Any, training_args: Any, head_args: EPHeadArguments, **settings: Any) -> Any:
    """
    The model that parsed arguments describe. What is new in it, the head, is drawn with the training's seed.

    Args:
        model_args ([`~trl.ModelConfig`]):
            Model arguments.
        training_args ([`~transformers.TrainingArguments`]):
            Training arguments.
        head_args ([`EPHeadArguments`]):
            The head.
        settings (`Any`):
            Fields of [`~trl_ext.EPConfig`], such as `num_labels`.

    Returns:
        [`~trl_ext.EPModelForSequenceClassification`]
    """
    from transformers import set_seed
    from trl import get_quantization_config

    from ...equilibrium.modeling import EPModelForSequenceClassification
    from .loading import resolve_model

    quantization = get_quantization_config(model_args)
    options: dict[str, Any] = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "trust_remote_code": getattr(training_args, "trust_remote_code", False),
        "dtype": model_args.dtype,
        **({} if quantization is None else {"quantization_config": quantization}),
        **(getattr(training_args, "model_init_kwargs", None) or {}),
    }
    path = resolve_model(model_args.model_name_or_path)
    set_seed(training_args.seed)
    model = EPModelForSequenceClassification.from_pretrained(
        path,
        **options,
        **head_args.head_settings(),
        **settings,
        pooling=head_args.pooling,
    )
    if head_args.freeze_backbone:
        model.model.requires_grad_(False)
    return model


def adapter_config(model_args: Any) -> Any:
    """
    The adapters that parsed arguments describe, for a classifier: its head trains beside them.

    Args:
        model_args ([`~trl.ModelConfig`]):
            Model arguments. TRL's default task, `CAUSAL_LM`, becomes `SEQ_CLS`.

    Returns:
        [`~peft.PeftConfig`] or `None`: `None` without `use_peft`.
    """
    from trl import get_peft_config

    if model_args.lora_task_type == "CAUSAL_LM":
        model_args.lora_task_type = "SEQ_CLS"
    return get_peft_config(model_args)
