"""How a subclass extends a parent's method without copying its body: it widens the model's forward
([`extend_forward`]), lets `super()` call it, and records what it returned there ([`ForwardRecorder`])."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


Forward = Callable[..., Any]


def extend_forward(model: nn.Module, extension: Forward, compiled: bool = False) -> None:
    """
    Widens what a model's forward takes and returns.

    Args:
        model (`torch.nn.Module`):
            Model, before any engine wraps it; under PEFT, the base model.
        extension (`Callable`):
            Called as `extension(forward, *args, **kwargs)` with the model's forward as it was.
        compiled (`bool`, *optional*, defaults to `False`):
            Whether `torch.compile` will trace the model. Both forwards then run as they are, and the backbone that
            they call is compiled: of what is traced as a whole, hooks are seen that were there the first time.
    """
    inner = model.forward
    if compiled:
        extension, inner = (torch.compiler.disable(each, recursive=False) for each in (extension, inner))
    # A partial and no function of this module: a call goes from the model straight to the extension
    forward = functools.partial(extension, inner)
    model.forward = functools.update_wrapper(forward, model.forward)  # type: ignore[method-assign]


class ForwardRecorder:
    """
    Stands in for a model inside a parent's method: adds keywords to its calls and keeps what they return.

    Args:
        model (`torch.nn.Module`):
            Model, wrapped by an engine or not.
        keywords (`dict[str, Any]`):
            Keywords that the parent knows nothing of, for the model's forward.

    Attributes:
        outputs (`list`): What the recorded calls returned, in order.
    """

    def __init__(self, model: nn.Module, keywords: dict[str, Any]):
        self.model, self.keywords = model, keywords
        self.outputs: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs, **self.keywords)
        self.outputs.append(output)
        return output

    def last_tokens(self, field: str, length: int) -> torch.Tensor:
        """
        A field of shape `(b, T, ...)` of all recorded outputs, its last `length` tokens.

        Returns:
            `torch.Tensor` of shape `(B, length, ...)`, `B` the sum of all `b`.
        """
        return torch.cat([getattr(output, field)[:, -length:] for output in self.outputs])


@contextmanager
def last_hidden_states(policy: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """
    Observes the backbone while the context lasts.

    Args:
        policy ([`~transformers.PreTrainedModel`]):
            Model with a language-model head.

    Yields:
        `list[torch.Tensor]`: to which each pass of the backbone adds its last hidden states, `(B, T, H)`.
    """
    states: list[torch.Tensor] = []
    hook = policy.base_model.register_forward_hook(lambda _m, _i, output: states.append(output.last_hidden_state))
    try:
        yield states
    finally:
        hook.remove()
