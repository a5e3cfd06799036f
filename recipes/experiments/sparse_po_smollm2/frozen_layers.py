"""The layers below an adapter give the same states in policy and reference, in every run on the same batches: they are
computed once."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn


class FrozenLayerCache:
    """
    Outputs of layers in which nothing trains, kept by the bits of their inputs. What comes out is what the layer would
    have computed, bit for bit; layers with an adapter, and calls that fill a cache of keys and values, run as ever.

    Args:
        max_bytes (`int`, *optional*, defaults to 1.5e9):
            Size of the outputs that are kept; the least recently used go first.
    """

    def __init__(self, max_bytes: int = 1_500_000_000):
        self.max_bytes = max_bytes
        self.hits = 0
        self._outputs: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def attach(self, layers: nn.ModuleList, while_no_grad: bool = True) -> None:
        """
        Extends the layers' forward. All models that share a cache have the same weights in these layers.

        Args:
            layers (`nn.ModuleList`):
                Decoder layers of a model, in order; those with a trainable parameter are left alone.
            while_no_grad (`bool`, *optional*, defaults to `True`):
                Whether outputs are taken from the cache without gradient too: not where something observes what
                happens inside the layers of the reference, as activation masks do.
        """
        for index, layer in enumerate(layers):
            if not any(parameter.requires_grad for parameter in layer.parameters()):
                layer.forward = partial(self._forward, index, layer.forward, while_no_grad)

    def _forward(
        self, index: int, forward: Callable[..., Any], while_no_grad: bool, hidden: torch.Tensor, **kwargs: Any
    ) -> Any:
        untouched = while_no_grad or torch.is_grad_enabled()
        # The second name is that of transformers 5.24
        fills_cache = any(kwargs.get(name) is not None for name in ("past_key_values", "cache"))
        if not untouched or hidden.requires_grad or fills_cache:
            return forward(hidden, **kwargs)
        key = hashlib.blake2b(str(index).encode())
        for tensor in _tensors([hidden, *kwargs.values()]):
            key.update(np.ascontiguousarray(tensor.numpy()).view(np.uint8).data)
        output = self._outputs.get(key.digest())
        if output is not None:
            self.hits += 1
            self._outputs.move_to_end(key.digest())
            return output
        output = forward(hidden, **kwargs)
        self._outputs[key.digest()] = output
        self._bytes += output.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._outputs.popitem(last=False)[1].nbytes
        return output


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
