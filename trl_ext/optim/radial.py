"""
The radial family: optimizers that treat a weight's norm and its direction apart, by one step with [`AdamP`]'s views,
dot products and exchange. A rule is two numbers for each row or weight: `w <- scale * w - factor * u` with Adam's
update `u`. [`AdamO`] and [`AdamH`] are such rules.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adam import AdamUpdate
from .kernels.rounding import copy_rounded_
from .projection import LEVELS
from .weights import Block, LocalTensor, Weight, row_dots


# Parts of names of weights that start at zero or that read the last hidden state out, besides `lm_head`
NOT_HIDDEN = re.compile(r"lora_B|lora_embedding|(^|\.)(lm_head|score|classifier|v_head|qa_outputs)\.")


def hidden_matrices(model: nn.Module) -> dict[str, str]:
    """
    The option `projection` of [`AdamO`] and [`AdamH`] that names a model's hidden matrices, as the authors of AdamH
    do: weights of at least two dimensions but embeddings and output layers, nor LoRA's B, which starts at zero.

    Args:
        model (`torch.nn.Module`):
            The model.

    Returns:
        `dict[str, str]`: patterns for the parameters' names.

    Example:

    ```python
    >>> from trl_ext.optim import AdamH, hidden_matrices

    >>> optimizer = AdamH(model.named_parameters(), lr=1e-2, projection=hidden_matrices(model))
    ```
    """
    others = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        others.add(id(head.weight))
    named = model.named_parameters(remove_duplicate=False)
    left_out = [name for name, param in named if id(param) in others or NOT_HIDDEN.search(name)]
    patterns = {rf"(^|\.)({'|'.join(map(re.escape, left_out))})$": "none"} if left_out else {}
    return {**patterns, "": "layer"}


@dataclass(frozen=True)
class TangentialBlock(Block):
    """
    A block whose gradient is taken without its radial part.

    Args:
        radial_gradient (`torch.Tensor` of shape `(1,)` or `(rows,)`, *optional*):
            `<g, w> / <w, w>` of the rows.
    """

    radial_gradient: torch.Tensor | None = None

    @property
    def grad(self) -> torch.Tensor:
        """The elements of the gradient's tangential part."""
        grad, dtype = super().grad, self.local.compute_dtype
        assert self.radial_gradient is not None
        rows = (self.radial_gradient.numel(), -1)
        weight = self.flat.to(dtype).view(rows)
        return torch.addcmul(grad.to(dtype).view(rows), weight, self.radial_gradient.unsqueeze(1), value=-1).view(-1)


@dataclass
class RadialWeight(Weight):
    """
    A weight whose norm and direction are updated apart. Its `dots` are, for each row, `<g, w>`, `<u, u>`, `<w, w>` and
    `<u, w>`.

    Args:
        radial_gradient (`torch.Tensor` of shape `(R,)`, *optional*):
            `<g, w> / <w, w>` of each local row or of all, where the moments are to be those of the gradient's
            tangential part.
    """

    radial_gradient: torch.Tensor | None = None

    @property
    def has_few_dots(self) -> bool:
        """Never: a rule may need each of them."""
        return False

    def blocks(self) -> Iterator[Block]:
        """Blocks as any weight's, of the gradient's tangential part once that is known."""
        for block in super().blocks():
            if self.radial_gradient is None:
                yield block
                continue
            rows = slice(block.row, block.row + block.num_rows) if self.by_rows else slice(None)
            yield TangentialBlock(
                block.local, block.start, block.stop, block.row, block.num_rows, self.radial_gradient[rows]
            )

    def add_gradient_dots(self, block: Block) -> None:
        """Adds a block's `<g, w>` and `<w, w>`."""
        dtype = self.local.compute_dtype
        weight, grad = block.flat.to(dtype), block.grad.to(dtype)
        self.dots[::2, block.row : block.row + block.num_rows] += row_dots(block, [(grad, weight), (weight, weight)])

    def add_dots(self, block: Block, displacement: torch.Tensor | None) -> None:
        """Adds a block's `<u, u>`, `<w, w>` and `<u, w>`, given the displacement `-u`."""
        assert displacement is not None
        weight = block.flat.to(displacement.dtype)
        found = row_dots(block, [(displacement, displacement), (weight, weight), (displacement, weight)])
        found[2].neg_()
        self.dots[1:, block.row : block.row + block.num_rows] += found


class RadialOptimizer(AdamUpdate):
    """Base of [`AdamO`] and [`AdamH`]. Without a test: every matrix is taken as a whole, or as `projection` says."""

    WEIGHT = RadialWeight

    def _is_planned(self, place: Any) -> bool:
        return False  # The kernels know AdamP's rule alone

    def _has_low_precision_state(self, param: torch.Tensor, group: dict[str, Any]) -> bool:
        return False  # Norms need more digits than half precision has

    def _level_of(self, group: dict[str, Any], name: str | None) -> str:
        level = super()._level_of(group, name)
        return "layer" if level == "test" else level

    def _apply_sums(self, weight: Weight, sums: torch.Tensor) -> None:
        assert isinstance(weight, RadialWeight)
        totals, _, cut_row_dots = weight.split_sums(sums)
        weight.take_cut_row_dots(cut_row_dots)
        dots = weight.dots if weight.by_rows else totals.unsqueeze(1)
        self.projection_counts.add_known(weight.key, weight.level)
        if not weight.numel:
            return
        scale, factor = self._combine(weight, dots)
        scratch = weight.displacement
        if scratch is None:
            scratch = self._scratch_tensor(min(weight.numel, weight.local.block_size), weight.local)
        for block in weight.blocks():
            size, rows = block.stop - block.start, slice(None)
            if weight.displacement is None:
                displacement = scratch[:size]
                self._displace_again(block, displacement)
            else:
                first = block.start - weight.shard.start
                displacement = scratch[first : first + size]
            if weight.by_rows:
                rows = slice(block.row, block.row + block.num_rows)
            self._combine_block(block, displacement, scale[rows], factor[rows])

    def _combine_block(
        self, block: Block, displacement: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor
    ) -> None:
        flat, shape = block.flat, (scale.numel(), -1)
        value = flat if flat.dtype == displacement.dtype else flat.to(displacement.dtype)
        value.view(shape).mul_(scale.unsqueeze(1)).addcmul_(displacement.view(shape), factor.unsqueeze(1))
        if value is not flat:
            copy_rounded_(flat, value, block.local.group["stochastic_rounding"], self._noise.on(flat.device))

    def _combine(self, weight: RadialWeight, dots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rule: scale of the weight and factor of the update, shapes `(R,)`, from dot products `(4, R)`."""
        raise NotImplementedError

    def _single_tensor(self, local: LocalTensor, level: str | None) -> str | None:
        dtype = local.compute_dtype
        tensors = [local.flat, local.grad, *local.moments]
        values = [tensor.to(dtype) for tensor in tensors if tensor is not None]
        if local.group["maximize"]:
            values[1] = -values[1]
        level = level if level in LEVELS else None
        self._reference(local, values, level)
        for tensor, value in ((tensors[0], values[0]), (tensors[2], values[2]), (tensors[3], values[3])):
            if tensor is not None and tensor is not value:
                tensor.copy_(value)
        return level

    def _reference(self, local: LocalTensor, values: Sequence[torch.Tensor], level: str | None) -> None:
        """The equation on weight, gradient and running averages of one tensor."""
        raise NotImplementedError
