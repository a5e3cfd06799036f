"""What a forward inside `super()` returned, for a subclass that extends a method without copying its body."""

from typing import Any

import torch
from torch import nn


class ForwardRecorder:
    """
    Stands in for a model inside a parent's method: adds keywords to its calls and keeps what they return.

    Args:
        model (`torch.nn.Module`):
            Model, wrapped by an engine or not.
        keywords (`dict[str, Any]`):
            Keywords that the parent knows nothing of, for the model's forward.
        first_only (`bool`, *optional*, defaults to `False`):
            Whether only the first call gets the keywords and is kept; later ones pass unchanged.

    Attributes:
        outputs (`list`): What the recorded calls returned, in order.
    """

    def __init__(self, model: nn.Module, keywords: dict[str, Any], first_only: bool = False):
        self.model, self.keywords, self.first_only = model, keywords, first_only
        self.outputs: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.first_only and self.outputs:
            return self.model(*args, **kwargs)
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
