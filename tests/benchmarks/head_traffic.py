"""
Bytes that the paired head's tiles move for each token and vocabulary entry, counted while it runs in Triton's
interpreter: what the kernels load and store, and what torch's operations read and write. The two products that end the
backward pass read the gradient as often as their own tiles ask for, and are counted apart, once each.

python -m tests.benchmarks.head_traffic
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from trl_ext.sparse_po.lm_head import paired_log_probs as head


NUM_TOKENS, HIDDEN_SIZE, VOCAB_SIZE = 3, 8, 4096


class Traffic(TorchDispatchMode):
    """Bytes of tensors of a tile's shape that operations read and write; the kernels' come through [`kernels`]."""

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.shapes = {shape, shape[::-1]}
        self.bytes: Counter[str] = Counter()

    def add(self, kind: str, value: Any) -> None:
        """Counts a tensor, if it is a tile."""
        if isinstance(value, torch.Tensor) and tuple(value.shape) in self.shapes:
            self.bytes[kind] += value.numel() * value.element_size()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func.overloadpacket.__name__ == "gather":  # One entry of a row
            return result
        schema = func._schema
        given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        is_out, changes = schema.overload_name == "out" or schema.name.endswith("copy_"), False
        for argument in schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            changes |= written
            if not (written and is_out):
                self.add("read", given.get(argument.name))
            if written:
                self.add("written", given.get(argument.name))
        if not changes:
            self.add("written", result)
        return result

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Counts what kernels load and store, a row's single numbers left out."""
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        launch = GridExecutor.__call__

        def count(kind: str, pointers: Any, mask: Any) -> None:
            if mask.data.size > 1:
                self.bytes[kind] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

        def counted_load(builder: Any, pointers: Any, mask: Any, *others: Any) -> Any:
            count("read", pointers, mask)
            return load(builder, pointers, mask, *others)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
            count("written", pointers, mask)
            return store(builder, pointers, value, mask, *others)

        def uncounted_launch(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():  # The interpreter copies tensors before and after
                launch(*args, **kwargs)

        counted = {"create_masked_load": counted_load, "create_masked_store": counted_store}
        with (
            mock.patch.multiple(InterpreterBuilder, **counted),
            mock.patch.object(GridExecutor, "__call__", uncounted_launch),
        ):
            yield


def traffic(dtype: torch.dtype, **options: Any) -> dict[str, Counter[str]]:
    """Bytes for each token and vocabulary entry: read, written, and read by the last products, in both passes."""
    torch.manual_seed(0)
    shapes = [(NUM_TOKENS, HIDDEN_SIZE), (VOCAB_SIZE, HIDDEN_SIZE)] * 2
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    labels = torch.randint(0, VOCAB_SIZE, (NUM_TOKENS,))
    mode = Traffic((NUM_TOKENS, VOCAB_SIZE))

    def product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool = False) -> None:
        mode.add("products", a)  # On a CPU it would convert the tile

    def counted(function: Callable[[], Any]) -> tuple[Any, Counter[str]]:
        mode.bytes.clear()
        with mode, mode.kernels():
            result = function()
        return result, Counter({kind: size / NUM_TOKENS / VOCAB_SIZE for kind, size in mode.bytes.items()})

    options = {"vocab_tile": VOCAB_SIZE, "return_statistics": True, **options}
    with mock.patch.multiple(head, _uses_kernels=lambda hidden: True, _add_product_=product):
        outputs, forward = counted(lambda: head.paired_log_probs(*tensors, labels, **options))
        _, backward = counted(lambda: (outputs[0].sum() + outputs[2].sum()).backward())
    return {"forward": forward, "backward": backward}


def main() -> None:
    sys.stdout.write(
        "| inputs | pass | read | written | together | the last products read |\n|---|---|---|---|---|---|\n"
    )
    for dtype in (torch.bfloat16, torch.float32):
        for name, found in traffic(dtype).items():
            read, written = found["read"], found["written"]
            row = (str(dtype)[6:], name, *(f"{size:g}" for size in (read, written, read + written, found["products"])))
            sys.stdout.write("| " + " | ".join(row) + " |\n")


if __name__ == "__main__":
    main()
