"""Configuration of a sequence classifier with an equilibrium-propagation head."""

from typing import Any, Literal, get_args

from transformers import AutoConfig, PreTrainedConfig

from ..core.checks import check_choice, shown
from .settings import HeadSettings, SpectralCap, as_widths, check_head, check_homeostasis, head_settings


try:
    from transformers.configuration_utils import SubConfigSpec
except ImportError:  # before transformers 5.20, where `sub_configs` says it all
    SubConfigSpec = None

PoolingName = Literal["last", "first", "mean", "pooler"]
# Of the backbone, which scripts and trainers read and set on a classifier's own configuration
TOKEN_IDS = ("pad_token_id", "eos_token_id", "bos_token_id", "sep_token_id")


def _of_backbone(name: str) -> Any:
    """A field of the backbone's text configuration, as one of the whole; a token that it has not is `None`."""

    def read(config: "EPConfig") -> Any:
        found = config.get_text_config()
        return getattr(found, name, None) if name in TOKEN_IDS else getattr(found, name)

    def write(config: "EPConfig", value: Any) -> None:
        setattr(config.get_text_config(), name, value)

    return property(read, write, doc=f"`{name}` of the backbone's text configuration.")


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
        input_norm, on_oscillation (*optional*):
            Settings of the head; see [`HeadSettings`].
        pooling (`str`, *optional*):
            State that the head reads: `"last"` or `"first"`, of the last or first token that is not padding; `"mean"`,
            of all such tokens; `"pooler"`, of an encoder's own pooler, as BERT's classifier. Defaults to `"last"` for
            decoders and, for encoders, to their `classifier_pooling`, as of ModernBERT, or `"first"`.
        homeostasis_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the Jacobian homeostasis objective in the loss.

    `pad_token_id`, `eos_token_id`, `bos_token_id`, `sep_token_id`, `hidden_size`, `vocab_size`, `num_hidden_layers`,
    `num_attention_heads` and `max_position_embeddings` are those of the backbone's text configuration, to read and to
    set.

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
    sub_configs = {"text_config": AutoConfig}
    has_no_defaults_at_init = True  # transformers before 5.20 builds one without arguments, to save what differs
    if SubConfigSpec is not None:  # The model type is that of a saved configuration without one
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
    spectral_cap: SpectralCap = HeadSettings.spectral_cap
    input_norm: str = HeadSettings.input_norm
    on_oscillation: str = HeadSettings.on_oscillation
    pooling: PoolingName | None = None
    homeostasis_coef: float = 0.0

    # What no evaluation gathers; the second is its name from transformers 5.24 on
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    pad_token_id = _of_backbone("pad_token_id")
    eos_token_id = _of_backbone("eos_token_id")
    bos_token_id = _of_backbone("bos_token_id")
    sep_token_id = _of_backbone("sep_token_id")
    hidden_size = _of_backbone("hidden_size")
    vocab_size = _of_backbone("vocab_size")
    num_hidden_layers = _of_backbone("num_hidden_layers")
    num_attention_heads = _of_backbone("num_attention_heads")
    max_position_embeddings = _of_backbone("max_position_embeddings")

    def __post_init__(self, **kwargs: Any):
        if self.text_config is None:
            raise ValueError("`text_config` is missing. Give the configuration of the backbone.")
        if not isinstance(self.text_config, (PreTrainedConfig, dict)):
            raise ValueError(
                f"`text_config` must be a configuration or a mapping, got {shown(self.text_config)}. Give that of the "
                "backbone."
            )
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama", **self.text_config})
        widths: Any = HeadSettings.hidden_features if self.hidden_features is None else self.hidden_features
        self.hidden_features = widths
        check_head(self)
        self.hidden_features = widths if isinstance(widths, int) else as_widths(widths)
        self.num_points, self.max_steps = int(self.num_points), int(self.max_steps)  # as JSON can hold them
        check_choice(
            self, "pooling", choices=(None, *get_args(PoolingName)), remedy="None is the backbone's own pooling."
        )
        check_homeostasis(self.homeostasis_coef, self.feedback)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers' own; a backbone's saved configuration is that of a head on it, with its labels."""
        found, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if found.get("model_type", cls.model_type) != cls.model_type:
            labels = {name: found[name] for name in ("id2label", "label2id", "problem_type") if name in found}
            found = {"model_type": cls.model_type, "text_config": found, **labels}
        return found, unused

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
