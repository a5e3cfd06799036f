"""The trainers of this package for axolotl: with its schedules, and their configuration built from axolotl's.

`AxolotlSparsePOTrainer`, `AxolotlConstrainedPPOTrainer`, `AxolotlConstrainedGRPOTrainer` and `AxolotlEPRewardTrainer`,
each with its `...Config`, are made on first use, since they extend classes of axolotl.
"""

import dataclasses
import difflib
import functools
from typing import Any

import trl_ext

from .methods import METHODS, Method, settings_of


# TRL computes these from others of the configuration, and refuses to be given both
DERIVED = ("generation_batch_size", "steps_per_generation")


def check_names(settings: dict[str, Any], method: Method) -> None:
    """
    Refuses what is no field of a method's configuration.

    Args:
        settings (`dict[str, Any]`):
            What stands under `trl_ext`.
        method (`Method`):
            The method.

    Raises:
        ValueError: If a name is unknown.
    """
    known = _names(getattr(trl_ext, method.config))
    for name in settings:
        if name not in known and name != "method":
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean `{close[0]}`?" if close else "See its documentation for the fields."
            raise ValueError(f"`trl_ext.{name}` is no field of `{method.config}`; {remedy}")


def arguments_of(
    args: Any, config_cls: type, settings: dict[str, Any], generation_batch_size: int | None = None
) -> Any:
    """
    A method's configuration from the one that axolotl built for the parent's trainer.

    Args:
        args ([`~transformers.TrainingArguments`]):
            axolotl's; what stands at its class's default is left to `config_cls`.
        config_cls (`type`):
            Dataclass to build.
        settings (`dict[str, Any]`):
            Further fields, which win.
        generation_batch_size (`int`, *optional*):
            The one given in axolotl's configuration; that of `args` may be TRL's own.

    Returns:
        An instance of `config_cls`.

    Raises:
        ValueError: If axolotl has set something that `config_cls` has no field for.
    """
    known = _names(config_cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if not field.init or field.name in DERIVED or field.name in settings or _is_default(field, value):
            continue
        if field.name not in known:
            raise ValueError(
                f"`{field.name}={value!r}`, set by axolotl, is no field of `{config_cls.__name__}`. Remove the key "
                "that sets it."
            )
        values[field.name] = value
    if generation_batch_size is not None:
        values["generation_batch_size"] = generation_batch_size
    return config_cls(**{**values, **settings})


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return value == field.default_factory()
    return value is field.default or (type(value) is type(field.default) and value == field.default)


def _names(config_cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config_cls) if field.init}


@functools.cache
def _config_class(method: Method) -> type:
    from axolotl.core.training_args import AxolotlTrainingMixins

    name = f"Axolotl{method.config}"
    own = type(name, (AxolotlTrainingMixins, getattr(trl_ext, method.config)), {"__module__": __name__})
    return dataclasses.dataclass(own)


@functools.cache
def _trainer_class(method: Method) -> type:
    from axolotl.core.trainers.mixins import DistributedParallelMixin, SchedulerMixin
    from axolotl.integrations.base import PluginManager

    parent: Any = getattr(trl_ext, method.trainer)

    class Trainer(SchedulerMixin, DistributedParallelMixin, parent):  # type: ignore[misc, valid-type]
        tag_names = ["axolotl"]

        def __init__(self, *positional: Any, args: Any, dataset_tags: Any = None, **kwargs: Any):
            cfg = PluginManager.get_instance().cfg
            settings = {name: value for name, value in settings_of(cfg).items() if name != "method"}
            given = (cfg.get("trl") or {}).get("generation_batch_size")
            own = arguments_of(args, _config_class(method), settings, given)
            super().__init__(*positional, args=own, **kwargs)

    Trainer.__name__ = Trainer.__qualname__ = f"Axolotl{method.trainer}"
    Trainer.__doc__ = parent.__doc__
    return Trainer


def __getattr__(name: str) -> Any:
    for method in METHODS.values():
        if name == f"Axolotl{method.trainer}":
            return _trainer_class(method)
        if name == f"Axolotl{method.config}":
            return _config_class(method)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
