"""
Optimizers by name: the registry, a trainer's `optimizer_cls_and_kwargs` for a name, and `optim` with `optim_args` in
configurations. install.py makes the names valid in transformers' own.
"""

import ast
import difflib
import inspect
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from .. import _upstream
from ..core.checks import check_value, shown
from ..core.parameter_groups import decay_groups
from .adamh import AdamH
from .adamo import AdamO
from .adamp import AdamP
from .radial import RadialOptimizer, hidden_matrices
from .scale_invariance import scale_invariant_weights
from .sgdp import SGDP
from .step import ProjectedOptimizer


_OPTIMIZERS: dict[str, type[Optimizer]] = {"adamp": AdamP, "sgdp": SGDP, "adamo": AdamO, "adamh": AdamH}
# Names that transformers' list of optimizers has from us
_added: set[str] = set()
# Option of an optimizer: the field of the training arguments that sets it
_FIELDS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
_ADAM_FIELDS = {"betas": "adam_beta1 and adam_beta2", "eps": "adam_epsilon"}


class OptimizerFactory(NamedTuple):
    """
    An optimizer and its options, as [`~transformers.Trainer`] takes them in `optimizer_cls_and_kwargs`. Called on a
    model, it builds the optimizer without a trainer, with the same parameter groups.

    Attributes:
        optimizer_cls (`type`):
            The optimizer, or [`GroupedOptimizer`].
        kwargs (`dict[str, Any]`):
            Its options.
    """

    optimizer_cls: type
    kwargs: dict[str, Any]

    def __call__(self, model: nn.Module) -> Optimizer:
        if self.optimizer_cls is GroupedOptimizer:
            return GroupedOptimizer()(model, **self.kwargs)
        return GroupedOptimizer()(model, self.optimizer_cls, **self.kwargs)


class GroupedOptimizer:
    """
    Builds an optimizer from a model, grouping its parameters by the rule of [`~transformers.Trainer`]: weight decay
    for all but biases and norms. Ours get their names, for `projection` and `report()`; those of [`AdamO`] and
    [`AdamH`] leave embeddings and output layers to AdamW unless `projection` says otherwise ([`hidden_matrices`]).
    """

    def __call__(
        self, model: nn.Module, optimizer_cls: type[Optimizer], weight_decay: float = 0.0, **options: Any
    ) -> Optimizer:
        if issubclass(optimizer_cls, RadialOptimizer) and options.get("projection") in (None, "auto"):
            options["projection"] = hidden_matrices(model)
        elif options.get("projection") == "auto":
            options["projection"] = scale_invariant_weights(model.config)
        named = issubclass(optimizer_cls, ProjectedOptimizer)
        return optimizer_cls(decay_groups(model, weight_decay, named), **options)


def optimizer_factory(name: str, args: Any = None, **kwargs: Any) -> OptimizerFactory:
    """
    What a trainer takes as `optimizer_cls_and_kwargs`, without registering anything.

    Args:
        name (`str`):
            `"adamp"`, `"sgdp"`, `"adamo"`, `"adamh"`, or a name given to [`register_optimizer`].
        args ([`~transformers.TrainingArguments`], *optional*):
            Configuration that `learning_rate`, `weight_decay` and, for an optimizer with `betas`, `adam_beta1`,
            `adam_beta2` and `adam_epsilon` are taken from. Without it they must stand in `kwargs`, since a trainer
            does not add them.
        kwargs:
            Options of the optimizer; they win over `args`. `projection="auto"` names the scale-invariant weights of a
            known architecture ([`scale_invariant_weights`]), or the hidden matrices for `"adamo"` and `"adamh"`, whose
            default it is ([`hidden_matrices`]). Without `args` and `weight_decay`, the trainer's own
            `args.weight_decay` holds.

    Returns:
        [`OptimizerFactory`]: the tuple `(class, options)`.

    Raises:
        ValueError: If the name or an option is unknown, or `projection` names weights while the trainer makes the
            groups, which have no names then.

    Example:

    ```python
    from trl import SFTConfig, SFTTrainer
    from trl_ext.optim import optimizer_factory

    args = SFTConfig(learning_rate=2e-5, weight_decay=0.1)
    trainer = SFTTrainer(..., args=args, optimizer_cls_and_kwargs=optimizer_factory("adamp", args, delta=0.1))
    ```
    """
    optimizer_cls = optimizer_class(name)
    options = set(inspect.signature(optimizer_cls).parameters)
    _refuse_unknown(kwargs, optimizer_cls, f"optimizer_factory({name!r}, ...)")
    if args is not None:
        kwargs = {**_options_of(args, options), **kwargs}
    elif "lr" in options and "lr" not in kwargs:
        warnings.warn(
            f"optimizer_factory({name!r}) got no `lr`, and a trainer does not add its `learning_rate`: the optimizer "
            f"uses its own default. Write optimizer_factory({name!r}, args) or give `lr`.",
            stacklevel=2,
        )
    if "weight_decay" in kwargs:
        return OptimizerFactory(GroupedOptimizer, {"optimizer_cls": optimizer_cls, **kwargs})
    if kwargs.get("projection") == "auto" or isinstance(kwargs.get("projection"), dict):
        raise ValueError(
            f"`projection={kwargs['projection']!r}` needs the parameters' names, which the trainer's groups lack. "
            f"Write optimizer_factory({name!r}, args, ...) or give `weight_decay`."
        )
    return OptimizerFactory(optimizer_cls, kwargs)


def optimizer_class(name: str) -> type[Optimizer]:
    """
    The class of a name.

    Raises:
        ValueError: If no optimizer has it.
    """
    if name not in _OPTIMIZERS:
        raise ValueError(
            f"No optimizer is called {name!r}; there are {sorted(_OPTIMIZERS)}. Add your own with "
            "`register_optimizer(name, cls)`."
        )
    return _OPTIMIZERS[name]


def register_optimizer(name: str, cls: type[Optimizer]) -> None:
    """
    Gives an optimizer a name, for [`optimizer_factory`] and, after [`register`], for `optim:`.

    Args:
        name (`str`):
            Lower-case letters, digits and underscores. A name given before is taken over.
        cls (`type`):
            Subclass of [`~torch.optim.Optimizer`].

    Raises:
        TypeError: If `cls` is no optimizer class.
        ValueError: If the name is not of that form, or is one of transformers' own.
    """
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"`cls` must be a subclass of `torch.optim.Optimizer`, got {cls!r}.")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"`name={name!r}` must be of lower-case letters, digits and underscores.")
    _refuse_taken(name)
    _OPTIMIZERS[name] = cls
    if _added:
        add_names()


def add_names() -> None:
    """Adds the names to transformers' closed list of optimizers, those that it does not have yet."""
    for name in [name for name in _OPTIMIZERS if name not in _added]:
        _refuse_taken(name)
        _upstream.add_optimizer_name(name, lambda context: own_optimizer(context.args))
        _added.add(name)


def remove_names() -> None:
    """Undoes [`add_names`]."""
    for name in sorted(_added):
        _upstream.remove_optimizer_name(name)
    _added.clear()


def post_init_with_own_optimizer(args: Any, super_post_init: Callable[[], None]) -> None:
    """
    Runs the `__post_init__` of a configuration's parent, which refuses an `optim` that transformers does not list. One
    of our names is out of its sight meanwhile and stays a plain string, unless [`register`] has listed it. Then checks
    `optim_args`.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The configuration, in its own `__post_init__`.
        super_post_init (`Callable`):
            `super().__post_init__`.

    Raises:
        ValueError: As the parent and [`check_optim_args`] do.
    """
    name = _name_of(args.optim)
    known = [*_upstream.optimizer_names(), *_OPTIMIZERS]
    if not isinstance(name, str) or name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"The optimizers are {', '.join(sorted(set(known)))}."
        raise ValueError(f"`optim={shown(name)}` is no optimizer; {remedy}")
    check_value("optim_args", args.optim_args, str | None)
    is_own = name in _OPTIMIZERS and name not in _added
    if is_own:
        args.optim = TrainingArguments.default_optim
    try:
        super_post_init()
    finally:
        if is_own:
            args.optim = name
    check_optim_args(args)


def parse_optim_args(text: str | None, optimizer_cls: type[Optimizer]) -> dict[str, Any]:
    """
    The options in a recipe's `optim_args`, such as `"delta=0.1,wd_ratio=0.1,nesterov=true"`, with their types.

    Args:
        text (`str` or `None`):
            Pairs `option=value`, separated by commas.
        optimizer_cls (`type`):
            Optimizer that takes them.

    Returns:
        `dict[str, Any]`

    Raises:
        ValueError: If it is not of that form, an option is unknown, given twice or set by a field of its own, or a
            value is not of the type of the option's default.
    """
    options: dict[str, Any] = {}
    for pair in (text or "").replace(" ", "").split(","):
        if not pair:
            continue
        name, equals, value = pair.partition("=")
        if not (name and equals and value) or name in options:
            raise ValueError(
                f"`optim_args: {text}`: {pair!r} is {'given twice' if name in options else 'not `option=value`'}. "
                'Write `optim_args: "delta=0.1,wd_ratio=0.1"`.'
            )
        options[name] = value
    where = f"`optim_args: {text}`"
    _refuse_unknown(options, optimizer_cls, where)
    parameters = inspect.signature(optimizer_cls).parameters
    fields = {**_FIELDS, **(_ADAM_FIELDS if "betas" in parameters else {})}
    for name in options.keys() & fields.keys():
        raise ValueError(f"{where}: `{name}` is set by the field `{fields[name]}`. Move it there.")
    return {name: _typed(name, value, parameters, where) for name, value in options.items()}


def named_optimizer(optim: Any) -> type[Optimizer] | None:
    """The class that a configuration's `optim` names, if it is one of ours."""
    return _OPTIMIZERS.get(_name_of(optim))


def own_optimizer(args: Any) -> OptimizerFactory:
    """What `optim` and `optim_args` of a configuration ask for, where they name one of ours."""
    name = _name_of(args.optim)
    return optimizer_factory(name, args, **_parsed(args.optim_args, _OPTIMIZERS[name]))


def _name_of(optim: Any) -> str:
    """The name in a member of transformers' enum, or in a string."""
    return getattr(optim, "value", optim)


def check_optim_args(args: Any) -> None:
    """
    Refuses wrong `optim_args` of a configuration whose `optim` is one of ours, and values that our optimizers refuse,
    before a model is loaded.

    Raises:
        ValueError: As [`parse_optim_args`] and the optimizer do.
    """
    optimizer_cls = named_optimizer(args.optim)
    if optimizer_cls is None:
        return
    options = _parsed(args.optim_args, optimizer_cls)
    if issubclass(optimizer_cls, ProjectedOptimizer):
        options = {key: value for key, value in options.items() if value != "auto"}
        accepted = set(inspect.signature(optimizer_cls).parameters)
        optimizer_cls([nn.Parameter(torch.zeros(1))], **{**_options_of(args, accepted), **options})


def _parsed(text: str | None, optimizer_cls: type[Optimizer]) -> dict[str, Any]:
    options = parse_optim_args(text, optimizer_cls)
    pattern, colon, view = str(options.get("projection", "")).rpartition(":")
    return {**options, "projection": {pattern: view}} if colon else options


def _options_of(args: Any, options: set[str]) -> dict[str, Any]:
    values = {"lr": args.learning_rate}
    if "betas" in options:
        values |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return {"weight_decay": args.weight_decay} | {name: values[name] for name in values.keys() & options}


def _typed(name: str, value: str, parameters: Any, where: str) -> Any:
    default = parameters[name].default if name in parameters else None
    try:
        typed: Any = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
    except (SyntaxError, ValueError):
        typed = value
    if name.endswith("dtype") and typed is not None:
        typed = getattr(torch, value, None)
        if not isinstance(typed, torch.dtype):
            raise ValueError(f"{where}: `{name}` must be a dtype of torch such as float32, got {value!r}.")
    is_number = isinstance(typed, int | float) and not isinstance(typed, bool)
    if isinstance(default, bool) and not isinstance(typed, bool):
        raise ValueError(f"{where}: `{name}` must be true or false, got {value!r}.")
    if isinstance(default, int | float) and not isinstance(default, bool) and not is_number:
        raise ValueError(f"{where}: `{name}` must be a number, got {value!r}.")
    return typed


def _refuse_unknown(options: Iterable[str], optimizer_cls: type[Optimizer], where: str) -> None:
    parameters = inspect.signature(optimizer_cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [name for name in parameters if name != "params"]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else f". It has {known}."
            raise ValueError(f"{where}: {optimizer_cls.__name__} has no option `{name}`{hint}")


def _refuse_taken(name: str) -> None:
    if name in _upstream.optimizer_names() and name not in _added:
        raise ValueError(
            f"transformers has an optimizer called {name!r} itself. Give yours another name with "
            "`register_optimizer(name, cls)`."
        )
