"""The hooks that axolotl calls: names and classes are made known, and what would fail in mid-run is refused."""

from collections.abc import MutableMapping
from typing import Any

from .methods import TRAINERS, Method, method_of, settings_of, trainer_path


try:
    from axolotl.integrations.base import BasePlugin
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] != "axolotl":
        raise  # axolotl is there and lacks a package of its own
    BasePlugin = object

# They make axolotl build parameter groups of its own, which hold none of a mask, a critic or a head with a rate of its
# own, and call an optimizer with them that is built from a model
OWN_GROUPS = ("loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale", "lr_groups")


class TRLExtPlugin(BasePlugin):
    """
    Plugin of axolotl: `plugins: [trl_ext.integrations.axolotl.TRLExtPlugin]`.

    With it `optimizer:` takes `adamp`, `sgdp`, `adamo` and `adamh` with their options in `optim_args`, models with an
    equilibrium head load through `model_type: AutoModelForSequenceClassification`, and `trl_ext: {method: ...}` trains
    with a trainer of this package (see [`TRLExtArgs`]).

    Example:

    ```yaml
    plugins: [trl_ext.integrations.axolotl.TRLExtPlugin]
    optimizer: adamp
    optim_args: {delta: 0.1, wd_ratio: 0.1}
    rl: dpo
    trl_ext: {method: sparse_po, mask_type: learned}
    ```
    """

    def register(self, cfg: MutableMapping[str, Any]) -> None:
        """
        Adds the optimizers' names to transformers' list and the equilibrium model to its auto classes, for this
        process, and names the method's trainer as axolotl's `trainer_cls`.

        Args:
            cfg (`MutableMapping[str, Any]`):
                The configuration as written; `trainer_cls` is set in it.

        Raises:
            ImportError: If the installed TRL is older than the method's trainer can extend.
            ValueError: If a key is wrong or cannot be used together with another.
        """
        from ...equilibrium import register_auto_classes
        from ...optim import register

        method = method_of(cfg)
        if method is not None:
            _check_settings(cfg, method)
        _check_optimizer(cfg, method)
        register()
        register_auto_classes()
        if method is not None and method.key == "rl":
            # With a class from `get_trainer_cls`, axolotl's builder for `rl` hands it no model
            cfg["trainer_cls"] = trainer_path(method)

    def on_config_validation_error(self, cfg: MutableMapping[str, Any]) -> None:
        """
        Takes the optimizers' names back.

        Args:
            cfg (`MutableMapping[str, Any]`):
                The configuration that axolotl refused.
        """
        from ...optim import unregister

        unregister()

    def get_input_args(self) -> str:
        """Where axolotl finds [`TRLExtArgs`]."""
        return f"{__package__}.TRLExtArgs"

    def get_trainer_cls(self, cfg: MutableMapping[str, Any]) -> Any:
        """
        The trainer of reward models with an equilibrium head; those of `rl` go by `trainer_cls`.

        Args:
            cfg (`MutableMapping[str, Any]`):
                The checked configuration.

        Returns:
            `type` or `None`
        """
        if settings_of(cfg).get("method") != "ep_reward":
            return None
        from . import trainers

        return trainers.AxolotlEPRewardTrainer


def _check_settings(cfg: MutableMapping[str, Any], method: Method) -> None:
    """Refuses unknown fields, and another trainer beside the method's."""
    from .trainers import check_names

    check_names(settings_of(cfg), method)
    other = cfg.get("trainer_cls")
    if other and not str(other).startswith(f"{TRAINERS}."):
        raise ValueError(f"`trainer_cls: {other}` and `trl_ext.method` both choose a trainer. Remove one of them.")


def _check_optimizer(cfg: MutableMapping[str, Any], method: Method | None) -> None:
    """Refuses wrong options of our optimizers, and what takes an optimizer away from them or from a method."""
    from ... import _upstream
    from ...optim.names import named_optimizer, parse_optim_args

    name = cfg.get("optimizer")
    optimizer_cls = named_optimizer(name)
    options = cfg.get("optim_args")
    if optimizer_cls is not None:
        if isinstance(options, dict):
            options = ",".join(f"{option}={value}" for option, value in options.items())
        parse_optim_args(options, optimizer_cls)
    elif method is not None and name is not None and str(name) not in _upstream.optimizer_names():
        raise ValueError(
            f"`optimizer: {name}` is built by axolotl's own trainers alone, and `trl_ext.method` has another. Use "
            "one of ours or of transformers'."
        )
    for key in OWN_GROUPS:
        if cfg.get(key) is not None and (optimizer_cls is not None or method is not None):
            what = f"`optimizer: {name}`" if method is None else "`trl_ext.method`"
            raise ValueError(f"`{key}` makes parameter groups that {what} does not take. Remove it.")
