"""Heads as rows of the channel level: a weight before a normalisation of each head is scale-invariant in each."""

from dataclasses import replace
from typing import Any

from .options import HEAD, projection_of
from .shards import RowPieces, Shard
from .weights import LocalTensor


def rows_of_a_head(group: dict[str, Any], name: str | None) -> int | None:
    """Rows of the channel level that `projection` takes together in a weight of some name; `None` where it doesn't."""
    if not isinstance(group["projection"], str | dict):
        return None
    found = HEAD.fullmatch(projection_of(group, name))
    return int(found[1]) if found else None


def view_by_heads(shard: Shard, group: dict[str, Any]) -> Shard:
    """
    A weight of shape `(H * N, ...)` as one of shape `(H, N, ...)` where its `projection` is `"head/N"`, so that a row
    of the channel level is a head; others as they are.

    Raises:
        ValueError: If its rows are not a multiple of `N`, or are cut into pieces.
    """
    num_rows = rows_of_a_head(group, shard.name) if len(shard.shape) > 1 else None
    if num_rows is None:
        return shard
    if shard.shape[0] % num_rows or isinstance(shard, RowPieces):
        raise ValueError(
            f'`projection` is "head/{num_rows}" for the weight {shard.name!r} of shape {shard.shape}, '
            + (
                "which is cut along its rows here."
                if isinstance(shard, RowPieces)
                else f"whose {shard.shape[0]} rows are no multiple of {num_rows}."
            )
            + ' Name the head dimension of the model, or use "layer".'
        )
    return replace(shard, shape=(shard.shape[0] // num_rows, num_rows, *shard.shape[1:]))


def by_heads(local: LocalTensor) -> LocalTensor:
    """A whole weight whose heads are its rows, with tensors of the shape that its shard has."""
    if not local.shards or local.param.ndim < 2 or rows_of_a_head(local.group, local.shards[0].name) is None:
        return local
    assert local.grad is not None
    flat, grad, *moments = (
        tensor.unflatten(0, local.shards[0].shape[:2]) for tensor in (local.flat, local.grad, *local.moments)
    )
    return replace(local, flat=flat, grad=grad, moments=tuple(moments))
