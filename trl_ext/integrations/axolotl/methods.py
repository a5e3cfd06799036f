"""The methods that `trl_ext: {method: ...}` names: what each needs of axolotl's configuration, and its classes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ... import _upstream


class Method(NamedTuple):
    """
    One method.

    Attributes:
        key (`str`), value (`Any`):
            The key of axolotl's configuration that chooses the parent's branch of axolotl, and its value.
        trainer (`str`), config (`str`):
            Names of the trainer and its configuration in `trl_ext`.
        extends_trl (`bool`):
            Whether TRL has to be one that [`require_trl`] lets pass.
    """

    key: str
    value: Any
    trainer: str
    config: str
    extends_trl: bool


METHODS = {
    "sparse_po": Method("rl", "dpo", "SparsePOTrainer", "SparsePOConfig", True),
    "constrained_ppo": Method("rl", "grpo", "ConstrainedPPOTrainer", "ConstrainedPPOConfig", True),
    "constrained_grpo": Method("rl", "grpo", "ConstrainedGRPOTrainer", "ConstrainedGRPOConfig", True),
    "ep_reward": Method("reward_model", True, "EPRewardTrainer", "EPRewardConfig", False),
}
TRAINERS = "trl_ext.integrations.axolotl.trainers"


def settings_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping under `trl_ext` of a configuration, empty without one."""
    settings = cfg.get("trl_ext")
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"`trl_ext: {settings}` must be a mapping, such as `trl_ext: {{method: sparse_po}}`.")
    return _plain(settings)


def _plain(value: Any) -> Any:
    """Mappings and lists of a configuration, which axolotl has in classes of its own, as Python's."""
    if isinstance(value, Mapping):
        return {key: _plain(own) for key, own in value.items()}
    return [_plain(own) for own in value] if isinstance(value, list | tuple) else value


def method_of(cfg: Mapping[str, Any]) -> Method | None:
    """
    The method that a configuration asks for, or `None`.

    Raises:
        ImportError: If the installed TRL is older than its trainer can extend.
        ValueError: If there is no such method, or the configuration lacks the key that it belongs to.
    """
    settings = settings_of(cfg)
    if not settings:
        return None
    name = settings.get("method")
    if name not in METHODS:
        raise ValueError(f"`trl_ext.method={name!r}` must be one of {', '.join(METHODS)}.")
    method = METHODS[name]
    if method.extends_trl:
        _upstream.require_trl()
    if cfg.get(method.key) != method.value:
        wanted = str(method.value).lower()
        raise ValueError(
            f"`trl_ext.method={name!r}` needs `{method.key}: {wanted}`, got {cfg.get(method.key)!r}. Write "
            f"`{method.key}: {wanted}`."
        )
    return method


def trainer_path(method: Method) -> str:
    """Where axolotl's `trainer_cls` finds a method's trainer."""
    return f"{TRAINERS}.Axolotl{method.trainer}"
