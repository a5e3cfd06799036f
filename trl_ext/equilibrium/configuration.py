"""Configuration of a sequence classifier with an equilibrium-propagation head."""

from typing import Any, Literal, get_args

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ..core.checks import check_choice, shown
from .settings import HeadSettings, check_head, check_homeostasis, head_settings


PoolingName = Literal["last", "first", "mean", "pooler"]


class EPConfig(PreTrainedConfig):
    r"""
    Configuration of [`EPModelForSequenceClassification`].

    Parameters:
        text_config (`PreTrainedConfig` or `dict`):
            Configuration of the backbone.
        hidden_features, feedback, feedback_angle, activation, estimator, num_points (*optional*):
            Settings of the head; see [`HeadSettings`].
        rotated, radius, correction, tolerance, max_steps, spectral_cap (*optional*):
            Settings of the head; see [`HeadSettings`].
        pooling (`str`, *optional*):
            State that the head reads: `"last"` or `"first"`, of the last or first token that is not padding; `"mean"`,
            of all such tokens; `"pooler"`, of an encoder's own pooler, as BERT's classifier. Defaults to `"last"` for
            decoders and, for encoders, to their `classifier_pooling`, as of ModernBERT, or `"first"`.
        homeostasis_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the Jacobian homeostasis objective in the loss.

    Raises:
        ValueError: If `text_config` is missing, a setting of the head is wrong, `pooling` is unknown, or
            `homeostasis_coef` is negative or has symmetric feedback.

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
    feedback: str = HeadSettings.feedback
    feedback_angle: float = HeadSettings.feedback_angle
    activation: str = HeadSettings.activation
    estimator: str = HeadSettings.estimator
    num_points: int = HeadSettings.num_points
    rotated: bool = HeadSettings.rotated
    radius: float = HeadSettings.radius
    correction: str = HeadSettings.correction
    tolerance: float = HeadSettings.tolerance
    max_steps: int = HeadSettings.max_steps
    spectral_cap: float | None = HeadSettings.spectral_cap
    pooling: PoolingName | None = None
    homeostasis_coef: float = 0.0

    def __post_init__(self, **kwargs: Any):
        if self.text_config is None:
            raise ValueError("`text_config` is missing. Give the configuration of the backbone.")
        if not isinstance(self.text_config, (PreTrainedConfig, dict)):
            raise ValueError(
                f"`text_config` must be a configuration or a mapping, got {shown(self.text_config)}. Give that of the "
                "backbone."
            )
        widths = HeadSettings.hidden_features if self.hidden_features is None else self.hidden_features
        self.hidden_features = list(widths) if isinstance(widths, tuple) else widths
        check_head(self)
        check_choice(
            self, "pooling", choices=(None, *get_args(PoolingName)), remedy="None is the backbone's own pooling."
        )
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
        return head_settings(self)
