"""Our optimizers in trainers: by `optim` in every configuration of a process, in one trainer, or as an argument."""

from importlib.util import find_spec
from typing import Any

import torch
from torch.optim import Optimizer

from .. import _upstream
from ..core.hub_kernel import kernel_of_hub, named_kernels
from .callbacks import OptimizerCheckCallback
from .names import GroupedOptimizer, add_names, named_optimizer, own_optimizer, remove_names


def register() -> None:
    """
    Makes `optim: adamp`, `optim: sgdp` and the names of [`register_optimizer`] valid in every TRL and transformers
    configuration, recipe and `--optim` flag of this process, with `optim_args: "delta=0.1,wd_ratio=0.1"`. A trainer
    made afterwards checks, before its first step, that it runs what was asked for ([`OptimizerCheckCallback`]).

    transformers' list of optimizers is closed, so this adds to its private tables; [`unregister`] undoes it. Parsers
    made before do not know the names. Does nothing the second time. This package's own configurations and trainers
    know the names without it.

    Raises:
        ValueError: If transformers has an optimizer of that name itself.
    """
    add_names()
    if OptimizerCheckCallback not in _upstream.DEFAULT_CALLBACKS:
        _upstream.DEFAULT_CALLBACKS.append(OptimizerCheckCallback)


def unregister() -> None:
    """Undoes [`register`]; a configuration made before keeps its `optim`, which transformers then refuses to build."""
    remove_names()
    if OptimizerCheckCallback in _upstream.DEFAULT_CALLBACKS:
        _upstream.DEFAULT_CALLBACKS.remove(OptimizerCheckCallback)


class OwnOptimizerMixin:
    """
    Makes a trainer build the optimizer that its `args.optim` names if it is one of ours, registered or not, and check
    before the first step that it runs. Stands before TRL's trainer among the bases; the configuration's
    `__post_init__` calls [`~trl_ext.optim.names.post_init_with_own_optimizer`].

    Args:
        args, kwargs:
            The trainer's own.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        handler = self.callback_handler  # type: ignore[attr-defined]
        if not any(isinstance(callback, OptimizerCheckCallback) for callback in handler.callbacks):
            check = OptimizerCheckCallback()
            # Its first event is over by now
            check.on_init_end(None, None, None, optimizer=handler.optimizer)
            handler.callbacks.insert(0, check)

    @classmethod
    def get_optimizer_cls_and_kwargs(cls, args: Any, model: Any = None) -> tuple[Any, Any]:
        """The optimizer that `args.optim` names, with its options; see [`~transformers.Trainer`]."""
        if named_optimizer(args.optim) is not None:
            take_kernel_of_hub()
            return own_optimizer(args)
        return super().get_optimizer_cls_and_kwargs(args, model)  # type: ignore[misc]


def take_kernel_of_hub() -> None:
    """
    Runs the Triton kernels of the Hub that `TRL_EXT_HUB_KERNELS` names as `trl-ext-adamp`, if they fit, from now on:
    trainers call it where `optim` names one of our optimizers. Nothing is loaded without a GPU.

    Raises:
        ValueError: If the variable names something that cannot be a kernel.
    """
    if named_kernels() and torch.cuda.is_available() and find_spec("triton"):
        from .kernels import plan, triton

        plan.substitute = kernel_of_hub("trl-ext-adamp", triton)


class OptimizerMixin:
    """
    Adds the argument `optimizer_cls_and_kwargs` to a trainer whose constructor lacks it, as those of TRL's DPO, GRPO,
    KTO and RLOO do. Stands before the trainer among the bases.

    Args:
        optimizer_cls_and_kwargs (`tuple`, *optional*):
            What [`optimizer_factory`] returns, or any class and options that [`~transformers.Trainer`] takes.
        args, kwargs:
            The trainer's own.

    Raises:
        ValueError: If `optimizers` holds an optimizer too.

    Example:

    ```python
    from trl import DPOConfig, DPOTrainer
    from trl_ext.optim import OptimizerMixin, optimizer_factory

    class AdamPDPOTrainer(OptimizerMixin, DPOTrainer):
        pass

    args = DPOConfig(learning_rate=1e-6)
    trainer = AdamPDPOTrainer(..., args=args, optimizer_cls_and_kwargs=optimizer_factory("adamp", args))
    ```
    """

    def __init__(self, *args: Any, optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if optimizer_cls_and_kwargs is None:
            return
        if self.optimizer is not None:  # type: ignore[attr-defined]
            raise ValueError("`optimizers` and `optimizer_cls_and_kwargs` both give an optimizer. Remove one of them.")
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        optimizer_cls, options = optimizer_cls_and_kwargs
        if optimizer_cls is GroupedOptimizer:
            optimizer_cls = options["optimizer_cls"]
        if isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer):
            self._expect_optimizer(optimizer_cls)

    def _expect_optimizer(self, optimizer_cls: type[Optimizer]) -> None:
        for callback in self.callback_handler.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, OptimizerCheckCallback):
                callback.expected = optimizer_cls
                return
        self.add_callback(OptimizerCheckCallback(optimizer_cls))  # type: ignore[attr-defined]
