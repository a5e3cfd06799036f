"""Options of a group and what an optimizer is handed: checks, and which weights `projection` names."""

import re
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import torch

from ..core.checks import check_value, shown
from .weights import is_backed, is_plain, local_tensor


# Options that are numbers, besides `betas`
NUMBERS = (
    "lr", "eps", "weight_decay", "delta", "wd_ratio", "momentum", "dampening", "adam_ratio", "radial_ratio",
)  # fmt: skip
_FLAGS: dict[str, Any] = {
    "capturable": bool,
    "differentiable": bool,
    "foreach": bool | None,
    "fused": bool | None,
    "maximize": bool,
    "nesterov": bool,
    "on_unknown_shards": Literal["raise", "adamw"],
    "project_momentum": bool,
    "stochastic_rounding": bool,
}
# What running averages can be kept in
STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Values of `projection`, and of its patterns
PROJECTIONS = ("test", "channel", "layer", "none")
# And of heads: "head/64" takes each 64 rows of the channel level together
HEAD = re.compile(r"head/([1-9][0-9]*)")


def projection_of(group: dict[str, Any], name: str | None) -> str:
    """
    What `projection` says of a group's weight of some name: `"channel"`, `"layer"` or `"head/N"`, the level at which
    it is known to be scale-invariant, `"test"` to find out, or `"none"`.

    Weights that no pattern matches are not projected: where the scale-invariant ones are named, a test of the others
    could only hit by chance.

    Raises:
        ValueError: If the group has patterns and the weight has no name.
    """
    projection = group["projection"]
    if not isinstance(projection, dict):
        return projection or "test"
    if name is None:
        raise ValueError(
            "`projection` has patterns, but a parameter has no name. Build the optimizer with "
            "`model.named_parameters()`, or give the groups `(name, parameter)` pairs; add a parameter to "
            "`param_names` of its group as well as to `params`."
        )
    return next((level for pattern, level in projection.items() if re.search(pattern, name)), "none")


def level_of(group: dict[str, Any], name: str | None) -> str:
    """[`projection_of`] of a weight where heads count as rows ([`view_by_heads`])."""
    projection = projection_of(group, name)
    return "channel" if HEAD.fullmatch(projection) else projection


def check_options(name: str, options: dict[str, Any]) -> None:
    """
    Checks the options of a group, defaults filled in.

    Raises:
        ValueError: If one is negative, not a number, or out of its range.
        RuntimeError: If two execution options exclude each other.
    """
    lr = options["lr"]
    for option, hint in _FLAGS.items():
        if option in options:
            check_value(option, options[option], hint, label=f"{name}: `{{}}`")
    _check_numbers(name, options)
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"{name}: a tensor `lr` must have one element, got shape {tuple(lr.shape)}.")
    for option in ("lr", "eps", "weight_decay", "delta", "wd_ratio", "adam_ratio", "radial_ratio"):
        value = options.get(option, 0.0)
        on_device = isinstance(value, torch.Tensor) and value.device.type != "cpu"
        if not on_device and not 0.0 <= value <= sys.float_info.max:
            raise ValueError(f"{name}: `{option}` must be finite and at least 0, got {shown(value)}.")
    if "momentum" in options and not 0.0 <= options["momentum"] < 1.0:
        raise ValueError(f"{name}: `momentum` must lie in [0, 1), got {shown(options['momentum'])}.")
    if "dampening" in options and not 0.0 <= options["dampening"] <= 1.0:
        raise ValueError(f"{name}: `dampening` must lie in [0, 1], got {shown(options['dampening'])}.")
    if "betas" in options:
        if len(options["betas"]) != 2:
            raise ValueError(f"{name}: `betas` must be two numbers, got {shown(options['betas'])}.")
        for index, beta in enumerate(options["betas"]):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name}: `betas[{index}]` must lie in [0, 1), got {shown(beta)}.")
    dtype = options.get("state_dtype")
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise ValueError(
            f"{name}: `state_dtype` must be a floating-point dtype such as `torch.float32`, got {shown(dtype)}."
        )
    if dtype is not None and dtype not in STATE_DTYPES:
        raise ValueError(
            f"{name}: `state_dtype={dtype}` can't hold the running averages: squares of gradients below its smallest "
            "number become 0, which the step divides by. Use `torch.float32`, `torch.float64` or `torch.bfloat16`."
        )
    _check_projection(name, options.get("projection"))
    _check_execution(name, options)


def _check_numbers(name: str, options: dict[str, Any]) -> None:
    """Refuses what is no number, such as the strings of a configuration file."""
    values = {option: options[option] for option in NUMBERS if option in options}
    betas = options.get("betas", ())
    if isinstance(betas, str) or not isinstance(betas, Sequence):
        raise ValueError(f"{name}: `betas` must be two numbers, got {shown(betas)}.")
    values |= {f"betas[{index}]": beta for index, beta in enumerate(betas)}
    for option, value in values.items():
        is_number = isinstance(value, Real | torch.Tensor) and not isinstance(value, bool)
        if not is_number:
            raise ValueError(f"{name}: `{option}` must be a number, got {shown(value)} ({type(value).__name__}).")


def _check_projection(name: str, projection: Any) -> None:
    if projection is None or _is_projection(projection):
        return
    if not isinstance(projection, dict):
        raise ValueError(
            f'{name}: `projection` must be one of {PROJECTIONS}, "head/N" or a dict of patterns, got '
            f"{shown(projection)}."
        )
    for pattern, level in projection.items():
        check_value("projection", pattern, str, label=f"{name}: a pattern of `{{}}`")
        if not _is_projection(level):
            raise ValueError(
                f'{name}: `projection[{pattern!r}]` must be one of {PROJECTIONS} or "head/N" with the head dimension '
                f"N, got {shown(level)}."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: `projection` has the pattern {pattern!r}, which is none: {error}.") from None


def _is_projection(value: Any) -> bool:
    return isinstance(value, str) and (value in PROJECTIONS or HEAD.fullmatch(value) is not None)


def _check_execution(name: str, options: dict[str, Any]) -> None:
    if options.get("foreach") and options.get("fused"):
        raise RuntimeError(f"{name}: `fused` and `foreach` cannot be `True` together.")
    if not options.get("differentiable"):
        return
    for option in ("foreach", "fused", "capturable", "stochastic_rounding"):
        if options.get(option):
            raise RuntimeError(f"{name}: `differentiable` and `{option}` cannot be `True` together.")


def check_param(name: str, param: torch.Tensor) -> None:
    """Refuses a parameter or gradient that no step can be taken on."""
    grad = param.grad
    assert grad is not None
    if grad.is_sparse:
        raise RuntimeError(
            f"{name} does not support sparse gradients: its test and projection need whole rows. Build the embedding "
            "with `sparse=False`, or give it to `torch.optim.SparseAdam`."
        )
    if param.is_complex():
        raise RuntimeError(
            f"{name} does not support complex parameters, got one of shape {tuple(param.shape)} and dtype "
            f"{param.dtype}. Pass `torch.view_as_real(parameter)`."
        )
    if grad.device != param.device or grad.shape != param.shape:
        raise RuntimeError(
            f"{name}: a gradient of shape {tuple(grad.shape)} on {grad.device} for a parameter of shape "
            f"{tuple(param.shape)} on {param.device}."
        )
    for what, tensor in (("parameter", local_tensor(param)), ("gradient", local_tensor(grad))):
        if is_plain(tensor) and not is_backed(tensor):
            raise RuntimeError(
                f"{name}: a {what} of shape {tuple(tensor.shape)} and dtype {tensor.dtype} on {tensor.device} has a "
                f"storage of {tensor.untyped_storage().nbytes()} bytes, which does not hold it: its memory was freed "
                "or made smaller. Take the step before it is freed, or allocate it again."
            )


def check_state(name: str, param: torch.Tensor, state: torch.Tensor) -> None:
    """Refuses a running average of a parameter that changed its shape or device since."""
    if state.shape != param.shape or state.device != param.device:
        raise RuntimeError(
            f"{name}: the state of a parameter has shape {tuple(state.shape)} on {state.device}, but the parameter "
            f"has shape {tuple(param.shape)} on {param.device}. Build the optimizer after resizing or moving."
        )
