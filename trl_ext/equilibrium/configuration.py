"""Configuration of a sequence classifier with an equilibrium-propagation head."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .feedback import check_homeostasis
from .pooling import PoolingName, check_pooling


# Fields of `EPConfig` that are arguments of `EPHead` under the same name
HEAD_FIELDS = (
    "hidden_features",
    "feedback",
    "feedback_angle",
    "activation",
    "estimator",
    "num_points",
    "rotated",
    "radius",
    "correction",
    "tolerance",
    "max_steps",
    "spectral_cap",
)


class EPConfig(PreTrainedConfig):
    r"""
    Configuration of [`EPModelForSequenceClassification`].

    Parameters:
        text_config (`PreTrainedConfig` or `dict`):
            Configuration of the backbone.
        hidden_features (`int` or `list[int]`, *optional*, defaults to `[256, 256]`):
            Widths of the head's relaxing layers.
        feedback (`str`, *optional*, defaults to `"symmetric"`):
            Feedback weights: `"symmetric"`, the forward ones transposed, or `"asymmetric"`, weights of their own.
        feedback_angle (`float`, *optional*, defaults to `0.0`):
            Degrees between asymmetric feedback weights and the transposed forward ones at the start, 0 to 180.
        activation (`str`, *optional*, defaults to `"tanh"`):
            `"tanh"`, `"dsilu"` or `"sigmoid"`.
        estimator (`str`, *optional*, defaults to `"holomorphic"`):
            `"holomorphic"`, `"symmetric"`, `"one_sided"`, `"tangent"` or `"exact"`.
        num_points (`int`, *optional*, defaults to `2`):
            Points on the circle of the holomorphic estimator.
        rotated (`bool`, *optional*, defaults to `True`):
            Whether those points stand half a step from the real axis.
        radius (`float`, *optional*, defaults to `1e-3`):
            Size of the nudge.
        correction (`str`, *optional*, defaults to `"none"`):
            `"asymep"` removes the bias of asymmetric feedback.
        tolerance (`float`, *optional*, defaults to `1e-4`):
            Residual at which a state counts as a fixed point.
        max_steps (`int`, *optional*, defaults to `100`):
            Sweeps at most.
        spectral_cap (`float`, *optional*):
            Bound on the spectral norm of every recurrent block.
        pooling (`str`, *optional*):
            State that the head reads: `"last"` or `"first"`, of the last or first token that is not padding; `"mean"`,
            of all such tokens; `"pooler"`, of an encoder's own pooler, as BERT's classifier. Defaults to `"last"` for
            decoders and, for encoders, to their `classifier_pooling`, as of ModernBERT, or `"first"`.
        homeostasis_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the Jacobian homeostasis objective in the loss.

    Raises:
        ValueError: If `text_config` is missing, `pooling` is unknown, or `homeostasis_coef` is negative or has
            symmetric feedback.

    Example:

    ```python
    from transformers import AutoConfig
    from trl_ext import EPConfig, EPModelForSequenceClassification

    config = EPConfig(text_config=AutoConfig.from_pretrained("Qwen/Qwen3-0.6B"), num_labels=1)
    model = EPModelForSequenceClassification(config)
    ```
    """

    model_type = "equilibrium_propagation"
    # The model type is that of a saved configuration without one; `text_config` itself has no default
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    text_config: Any = None
    hidden_features: int | list[int] | None = None
    feedback: str = "symmetric"
    feedback_angle: float = 0.0
    activation: str = "tanh"
    estimator: str = "holomorphic"
    num_points: int = 2
    rotated: bool = True
    radius: float = 1e-3
    correction: str = "none"
    tolerance: float = 1e-4
    max_steps: int = 100
    spectral_cap: float | None = None
    pooling: PoolingName | None = None
    homeostasis_coef: float = 0.0

    def __post_init__(self, **kwargs: Any):
        if self.text_config is None:
            raise ValueError("`text_config` is missing. Give the configuration of the backbone.")
        if self.hidden_features is None:
            self.hidden_features = [256, 256]
        elif not isinstance(self.hidden_features, int):
            self.hidden_features = list(self.hidden_features)
        check_pooling(self.pooling)
        check_homeostasis(self.homeostasis_coef, self.feedback)
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The backbone's text configuration, which TRL's trainers and the pooling read `pad_token_id` from."""
        return self.text_config.get_text_config(decoder=decoder, encoder=encoder)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a `dict`, without the folder or id that the backbone came from."""
        output = super().to_dict()
        output["text_config"].pop("_name_or_path", None)
        return output

    def head_settings(self) -> dict[str, Any]:
        """Keyword arguments of [`EPHead`], but for the numbers of features in and out."""
        return {name: getattr(self, name) for name in HEAD_FIELDS}


AutoConfig.register(EPConfig.model_type, EPConfig, exist_ok=True)
