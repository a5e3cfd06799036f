"""What AdamP and SGDP share."""

import math
from collections.abc import Callable
from typing import Any

import torch


class ProjectedOptimizer(torch.optim.Optimizer):
    """
    Base of [`AdamP`] and [`SGDP`]: torch.optim's conventions around an update that a subclass takes for each parameter.
    """

    # Options that checkpoints of other implementations lack, with the values that stand for their behaviour
    OPTIONS: dict[str, Any] = {
        "foreach": None,
        "fused": None,
        "maximize": False,
        "capturable": False,
        "differentiable": False,
    }  # fmt: skip

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        check_hyperparameters(type(self).__name__, defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer` does, after a check of its options."""
        check_hyperparameters(type(self).__name__, {**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, value in self.OPTIONS.items():
                group.setdefault(option, value)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """
        Takes one step.

        Args:
            closure (`Callable`, *optional*):
                Evaluates the model anew and returns the loss.

        Returns:
            The closure's loss, or `None`.

        Raises:
            RuntimeError: If a gradient is sparse, or a parameter is complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        self._check_param(param)
                        grad = -param.grad if group["maximize"] else param.grad
                        self._update(param, grad, group)
        return loss

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _check_param(self, param: torch.Tensor) -> None:
        name = type(self).__name__
        assert param.grad is not None
        if param.grad.is_sparse:
            raise RuntimeError(
                f"{name} does not support sparse gradients: its test and projection need whole rows. Build the "
                "embedding with `sparse=False`, or give it to `torch.optim.SparseAdam`."
            )
        if param.is_complex():
            raise RuntimeError(
                f"{name} does not support complex parameters, got one of shape {tuple(param.shape)} and dtype "
                f"{param.dtype}. Pass `torch.view_as_real(parameter)`."
            )


def check_hyperparameters(name: str, options: dict[str, Any]) -> None:
    """
    Checks the options of a group.

    Raises:
        ValueError: If one is negative, not a number, or out of its range.
        RuntimeError: If two execution options exclude each other.
    """
    lr = options["lr"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"{name}: a tensor `lr` must have one element, got shape {tuple(lr.shape)}.")
    for option in ("lr", "eps", "weight_decay", "delta", "wd_ratio"):
        value = options[option]
        on_device = isinstance(value, torch.Tensor) and value.device.type != "cpu"
        if not on_device and not 0.0 <= value < math.inf:
            raise ValueError(f"{name}: `{option}` must be finite and at least 0, got {value}.")
    for option in ("momentum", "dampening"):
        if option in options and not 0.0 <= options[option] < (1.0 if option == "momentum" else math.inf):
            raise ValueError(f"{name}: `{option}` must be at least 0 (momentum below 1), got {options[option]}.")
    for index, beta in enumerate(options.get("betas", ())):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}: `betas[{index}]` must lie in [0, 1), got {beta}.")
    if "betas" in options and len(options["betas"]) != 2:
        raise ValueError(f"{name}: `betas` must be two numbers, got {options['betas']}.")
    if options.get("foreach") and options.get("fused"):
        raise RuntimeError(f"{name}: `fused` and `foreach` cannot be `True` together.")
    if options.get("differentiable") and (options.get("fused") or options.get("foreach")):
        raise RuntimeError(f"{name}: `differentiable` needs `fused` and `foreach` unset.")
