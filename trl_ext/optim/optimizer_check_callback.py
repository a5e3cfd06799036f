"""Checks, before the first step, that training runs the optimizer that was asked for."""

from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback


class OptimizerCheckCallback(TrainerCallback):
    """
    Raises at the start of training if the optimizer under all wrappers is not the one asked for. Three replacements
    happen without a word: where DeepSpeed offloads the optimizer, accelerate puts `DeepSpeedCPUAdam` in its place;
    under DeepSpeed, Trainer puts AdamW in the place of what was passed as `optimizers=`; and an `optimizer` block in a
    DeepSpeed config wins over everything.

    [`register`] adds it to every trainer made afterwards, and [`OptimizerMixin`] to its own.

    Args:
        expected (`type`, *optional*):
            Class asked for. Defaults to the class of the trainer's `optimizers=`, for which the callback must be among
            the constructor's `callbacks`, or else to the one that `args.optim` names, if it is one of ours.

    Example:

    ```python
    from trl_ext.optim import AdamP, OptimizerCheckCallback

    trainer.add_callback(OptimizerCheckCallback(AdamP))
    ```
    """

    def __init__(self, expected: type[Optimizer] | None = None):
        self.expected = expected
        self._passed: type[Optimizer] | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._passed = None if optimizer is None else type(optimizer)

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """
        Raises:
            RuntimeError: If the optimizer was replaced.
        """
        from .factory import named_optimizer

        expected = self.expected or self._passed or named_optimizer(args.optim)
        chain = [type(wrapper) for wrapper in optimizer_chain(optimizer)]
        if expected is None or issubclass(chain[-1], expected):
            return
        names = " -> ".join(cls.__name__ for cls in chain)
        raise RuntimeError(
            f"Training would run {chain[-1].__name__} instead of {expected.__name__} ({names}): "
            f"{self._cause(args, chain)}"
        )

    def _cause(self, args: Any, chain: list[type]) -> str:
        deepspeed = getattr(args.hf_deepspeed_config, "config", None) if args.deepspeed_plugin else None
        if deepspeed and "optimizer" in deepspeed:
            return "the `optimizer` block of the DeepSpeed config wins. Remove that block."
        if chain[-1].__name__.startswith("DeepSpeedCPU"):
            return (
                "accelerate replaces every optimizer where DeepSpeed offloads the optimizer's state. Add "
                '`"zero_force_ds_cpu_optimizer": false` to the top level of the DeepSpeed config.'
            )
        if deepspeed is not None and self._passed is not None:
            return (
                "Trainer drops `optimizers=` under DeepSpeed. Remove `optimizers=` and set "
                "`trainer.optimizer_cls_and_kwargs = optimizer_factory(...)` before `trainer.train()`, or call "
                "`trl_ext.optim.register()` and set `optim` in the configuration."
            )
        return "something else was given to the trainer. Remove its `optimizers=` or `optimizer_cls_and_kwargs=`."


def optimizer_chain(optimizer: Any) -> list[Any]:
    """An optimizer's wrappers, outermost first, and the optimizer itself, last."""
    chain = [optimizer]
    while getattr(chain[-1], "optimizer", None) is not None:
        chain.append(chain[-1].optimizer)
    return chain


def bottom_optimizer(optimizer: Any) -> Any:
    """The optimizer under all wrappers of accelerate and DeepSpeed."""
    return optimizer_chain(optimizer)[-1]
