"""`optimizer_cls_and_kwargs` for trainers that do not take it."""

from typing import Any

from torch.optim import Optimizer

from .factory import GroupedOptimizer
from .optimizer_check_callback import OptimizerCheckCallback


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
