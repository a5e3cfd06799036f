"""Arguments that the scripts of the equilibrium-propagation head share, and the model they describe."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal


PREFIX = "head_"


@dataclass
class EPHeadArguments:
    """
    The head, and whether the backbone trains. Every `head_*` is an argument of [`~trl_ext.EPHead`] with a prefix.

    Args:
        head_hidden_features (`list[int]`, *optional*, defaults to `[256, 256]`):
            Widths of the relaxing layers.
        head_feedback (`str`, *optional*, defaults to `"symmetric"`):
            Feedback weights: `"symmetric"` or `"asymmetric"`.
        head_feedback_angle (`float`, *optional*, defaults to `0.0`):
            Degrees between asymmetric feedback weights and the transposed forward ones at the start.
        head_activation (`str`, *optional*, defaults to `"tanh"`):
            `"tanh"`, `"dsilu"` or `"sigmoid"`.
        head_estimator (`str`, *optional*, defaults to `"holomorphic"`):
            `"holomorphic"`, `"symmetric"`, `"one_sided"`, `"tangent"` or `"exact"`.
        head_num_points (`int`, *optional*, defaults to `2`):
            Points of the holomorphic estimator.
        head_rotated (`bool`, *optional*, defaults to `True`):
            Whether the points stand half a step from the real axis.
        head_radius (`float`, *optional*, defaults to `1e-3`):
            Size of the nudge.
        head_correction (`str`, *optional*, defaults to `"none"`):
            `"asymep"` removes the bias of asymmetric feedback.
        head_tolerance (`float`, *optional*, defaults to `1e-4`):
            Residual at which a state counts as a fixed point.
        head_max_steps (`int`, *optional*, defaults to `100`):
            Sweeps at most.
        head_spectral_cap (`float`, *optional*):
            Bound on the spectral norm of every recurrent block.
        pooling (`str`, *optional*):
            State that the head reads: `"last"`, `"first"`, `"mean"` or `"pooler"`. Defaults to the last token's for
            decoders and, for encoders, to what their configuration says or the first token's.
        freeze_backbone (`bool`, *optional*, defaults to `False`):
            Whether only the head trains.
        show_alignment (`int`, *optional*, defaults to `0`):
            Number of evaluation examples on which estimated and exact gradients are compared through training, as a
            picture ([`~trl_ext.EPAlignmentCallback`]).
    """

    head_hidden_features: list[int] = field(
        default_factory=lambda: [256, 256], metadata={"help": "Widths of the head's relaxing layers."}
    )
    head_feedback: Literal["symmetric", "asymmetric"] = field(
        default="symmetric", metadata={"help": "Feedback weights: the forward ones transposed, or their own."}
    )
    head_feedback_angle: float = field(
        default=0.0, metadata={"help": "Degrees between feedback and transposed forward weights at the start."}
    )
    head_activation: Literal["tanh", "dsilu", "sigmoid"] = field(
        default="tanh", metadata={"help": "Activation of the relaxing layers."}
    )
    head_estimator: Literal["holomorphic", "symmetric", "one_sided", "tangent", "exact"] = field(
        default="holomorphic", metadata={"help": "Estimator of the gradient."}
    )
    head_num_points: int = field(default=2, metadata={"help": "Points of the holomorphic estimator."})
    head_rotated: bool = field(default=True, metadata={"help": "Points half a step from the real axis."})
    head_radius: float = field(default=1e-3, metadata={"help": "Size of the nudge."})
    head_correction: Literal["none", "asymep"] = field(
        default="none", metadata={"help": "'asymep' removes the bias of asymmetric feedback."}
    )
    head_tolerance: float = field(default=1e-4, metadata={"help": "Residual of a fixed point."})
    head_max_steps: int = field(default=100, metadata={"help": "Sweeps at most."})
    head_spectral_cap: float | None = field(
        default=None, metadata={"help": "Bound on the spectral norm of every recurrent block."}
    )
    pooling: Literal["last", "first", "mean", "pooler"] | None = field(
        default=None, metadata={"help": "State that the head reads: 'last', 'first', 'mean' or 'pooler'."}
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the head only."})
    show_alignment: int = field(
        default=0, metadata={"help": "Evaluation examples on which the gradient is compared with the exact one."}
    )

    def head_settings(self) -> dict[str, Any]:
        """The head's settings under the names of [`~trl_ext.EPConfig`]."""
        own = [item.name for item in fields(self) if item.name.startswith(PREFIX)]
        return {name.removeprefix(PREFIX): getattr(self, name) for name in own}


def check_head(head_args: EPHeadArguments, homeostasis_coef: float | None) -> None:
    """
    Refuses a head that cannot be built, before a model or data is loaded.

    Args:
        head_args ([`EPHeadArguments`]):
            The head.
        homeostasis_coef (`float`, *optional*):
            Weight of the homeostasis objective.

    Raises:
        RecipeError: If an argument of the head is wrong.
    """
    from ...equilibrium.feedback import check_homeostasis
    from ...equilibrium.head import EPHead
    from .strict_parser import RecipeError

    try:
        EPHead(1, out_features=1, **head_args.head_settings())
        check_homeostasis(homeostasis_coef or 0.0, head_args.head_feedback)
    except ValueError as error:
        raise RecipeError(f"{error} (In a recipe, the head's arguments begin with `{PREFIX}`.)") from error


def load_model(model_args: Any, training_args: Any, head_args: EPHeadArguments, **settings: Any) -> Any:
    """
    The model that parsed arguments describe.

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
    model = EPModelForSequenceClassification.from_pretrained(
        resolve_model(model_args.model_name_or_path),
        **options,
        **head_args.head_settings(),
        **settings,
        pooling=head_args.pooling,
    )
    if head_args.freeze_backbone:
        model.model.requires_grad_(False)
    return model
