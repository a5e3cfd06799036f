"""
Which slice of which weight this process holds, whatever has cut the parameters, and the sum of numbers over the
processes that hold a weight together.

An optimizer sees whole parameters under DDP, local parts of distributed tensors under FSDP2, one-dimensional pieces
under FSDP1, and one flat tensor for a whole group of parameters under DeepSpeed's ZeRO. Each becomes a list of
[`Shard`].
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement


# Key of a group that stays the group's own: its index does not, since wrappers drop and split groups
GROUP_KEY = "projection_group"


@dataclass(frozen=True)
class Shard:
    """
    A contiguous slice of a row-major weight inside a local tensor.

    Args:
        index (`int`):
            The weight's place in its group, as the group was made.
        shape (`tuple[int, ...]`):
            Shape of the whole weight.
        start (`int`):
            First element in the local tensor, flat.
        offset (`int`):
            The same element's place in the whole weight, flat.
        numel (`int`):
            Elements held here; 0 where the weight lies on other processes.
        borders (`tuple[int, ...]`):
            Places inside the weight where its next holder begins, the same on all processes; empty where one process
            holds it whole.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            The processes that hold the weight together.
        name (`str`, *optional*):
            The weight's name, where the optimizer was given named parameters.
    """

    index: int
    shape: tuple[int, ...]
    start: int
    offset: int
    numel: int
    borders: tuple[int, ...] = ()
    process_group: Any = None
    name: str | None = None

    @property
    def num_rows(self) -> int:
        """Rows at the channel level."""
        return self.shape[0] if self.shape else 1

    @property
    def row_size(self) -> int:
        """Elements in a row at the channel level."""
        return math.prod(self.shape[1:])

    @property
    def cut_rows(self) -> list[int]:
        """Rows that more than one process holds a part of."""
        return sorted({border // self.row_size for border in self.borders if border % self.row_size})


class UnknownShardsError(RuntimeError):
    """The layout of a parameter's shards can't be read."""


@dataclass(frozen=True)
class Original:
    """
    A parameter as it was handed to the optimizer; wrappers may replace, flatten or free it afterwards. A lazy one has
    no dimensions and no size yet.
    """

    reference: weakref.ref[torch.Tensor]
    ndim: int | None
    numel: int | None
    name: str | None = None

    @classmethod
    def of(cls, param: torch.Tensor, name: str | None = None) -> "Original":
        if torch.nn.parameter.is_lazy(param):
            return cls(weakref.ref(param), None, None, name)
        return cls(weakref.ref(param), param.ndim, param.numel(), name)


class Layout(NamedTuple):
    """A tensor that was stepped on, its shapes then, where its weights lie in it, and its group."""

    reference: weakref.ref[torch.Tensor]
    shapes: tuple[torch.Size, torch.Size]
    shards: list[Shard]
    group_key: int


class Layouts:
    """
    The weights in each tensor that an optimizer steps on, and the parameters that its groups were made of.

    A tensor's layout is read at its first step, and again when its shape changed: a plain parameter may be grown, cut,
    added, moved or left out between two steps. Such parameters are known by themselves, whatever their place in their
    group is by then, and keep the names that they came with.
    """

    def __init__(self) -> None:
        self._originals: dict[int, list[Original]] = {}
        self._layouts: dict[int, Layout] = {}
        # Names as the groups had them when they were last looked at
        self._names: dict[int, list[str] | None] = {}

    def __contains__(self, group_key: Any) -> bool:
        return group_key in self._originals

    def new_key(self) -> int:
        """A key that no group has."""
        return max(self._originals, default=-1) + 1

    def remember(self, group: dict[str, Any]) -> None:
        """Records the parameters of a new group."""
        key, params, names = group[GROUP_KEY], group["params"], group.get("param_names")
        own = names if names is not None and len(names) == len(params) else [None] * len(params)
        self._originals[key] = [Original.of(param, name) for param, name in zip(params, own, strict=True)]
        self._names[key] = None if names is None else list(names)

    def renew_names(self, groups: Sequence[dict[str, Any]]) -> None:
        """Takes over what was changed in the groups' names, where there is one for each parameter."""
        for group in groups:
            key, names = group[GROUP_KEY], group.get("param_names")
            if names == self._names[key]:
                continue
            self._names[key] = None if names is None else list(names)
            if names is None or len(names) != len(group["params"]):
                continue
            originals = self._originals[key]
            for param, name in zip(group["params"], names, strict=True):
                index = _index_of(param, originals)
                if index is not None:
                    originals[index] = replace(originals[index], name=name)
            self._layouts = {name: found for name, found in self._layouts.items() if found.group_key != key}

    def read(self, param: torch.Tensor, place: int, group: dict[str, Any]) -> list[Shard]:
        """
        The weights in a tensor of a group, at its `place` there.

        Raises:
            UnknownShardsError: If the layout can't be read, unless the group's `on_unknown_shards` is `"adamw"`.
        """
        shapes, known = _shapes(param), self._layouts.get(id(param))
        if known is not None and known.reference() is param and known.shapes == shapes:
            return known.shards
        key = group[GROUP_KEY]
        originals = self._originals[key]
        try:
            shards = read_shards(param, place, group["params"], originals)
        except UnknownShardsError:
            if group["on_unknown_shards"] == "raise":
                raise
            shards = []
        if len(shards) == 1 and tuple(param.shape) == shards[0].shape:
            self._adopt(param, shards[0].index, place, group)
        # A flat parameter of FSDP1 may be all that the group was made of
        names = {index: original.name for index, original in enumerate(originals)}
        shards = [replace(shard, name=names.get(shard.index)) for shard in shards]
        self._layouts = {name: layout for name, layout in self._layouts.items() if layout.reference() is not None}
        self._layouts[id(param)] = Layout(weakref.ref(param), shapes, shards, key)
        return shards

    def _adopt(self, param: torch.Tensor, index: int, place: int, group: dict[str, Any]) -> None:
        """Records a whole parameter that was added, or that replaced another one, after the group was made."""
        originals, names = self._originals[group[GROUP_KEY]], group.get("param_names")
        name = names[place] if names is not None and len(names) == len(group["params"]) else None
        if any(original.name == name for other, original in enumerate(originals) if other != index):
            name = None  # The names still stand as they did before parameters were left out
        if index == len(originals):
            if name is None:  # It may come from another group
                everywhere = [original for own in self._originals.values() for original in own]
                found = _index_of(param, everywhere)
                name = None if found is None else everywhere[found].name
            originals.append(Original.of(param, name))
        elif originals[index].reference() is not param and param.ndim > 1:
            originals[index] = Original.of(param, name or originals[index].name)

    def current(self) -> Iterator[tuple[torch.Tensor, list[Shard], int]]:
        """Tensors that were stepped on and still have the shape of then, with their weights and the group's key."""
        for layout in self._layouts.values():
            param = layout.reference()
            if param is not None and layout.shapes == _shapes(param):
                yield param, layout.shards, layout.group_key


def _shapes(param: torch.Tensor) -> tuple[torch.Size, torch.Size]:
    return param.shape, param._local_tensor.shape if isinstance(param, DTensor) else param.shape


def _index_of(param: torch.Tensor, originals: Sequence[Original]) -> int | None:
    return next((index for index, original in enumerate(originals) if original.reference() is param), None)


def read_shards(
    param: torch.Tensor, place: int, params: Sequence[torch.Tensor], originals: Sequence[Original]
) -> list[Shard]:
    """
    The weights in one tensor of a group, `param` at its `place` among `params`, in the order of the `originals` that
    the group was made with. A whole parameter that is none of them gets the index behind the last of them. What no
    shard covers is padding.

    Raises:
        UnknownShardsError: If the layout can't be read.
    """
    is_in_place = place < len(originals) and originals[place].reference() is param
    own = place if is_in_place else _index_of(param, originals)
    index = _index_of_replacement(place, params, originals) if own is None else own
    if isinstance(param, DTensor):
        return [_distributed_tensor_shard(param, index)]
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_distributed:
        from .._upstream import fsdp1_layout  # Imports TRL, which one process can do without

        layout = fsdp1_layout(param)
        if layout is not None:
            return _fsdp1_shards(param, index, layout)
    if own is not None:
        if tuple(getattr(param, "ds_shape", param.shape)) != tuple(param.shape):
            raise _unknown(param, "a ZeRO-3 parameter outside DeepSpeed's optimizer")
        ndim = originals[own].ndim
        if ndim is not None and param.ndim < 2 <= ndim:
            raise _unknown(param, f"a parameter that had {ndim} dimensions when it was added")
        return [_whole(param, own)]
    if param.ndim > 1:
        return [_whole(param, index)]
    alive = [(place, original.reference()) for place, original in enumerate(originals)]
    trainable = [(place, original) for place, original in alive if original is not None and original.requires_grad]
    shards = _zero3_shards(param, trainable) or _zero12_shards(param, trainable)
    if shards is not None:
        return shards
    is_alike = index < len(originals) and param.ndim == originals[index].ndim
    if (is_alike and len(originals) == len(params)) or not _may_hold_others(param, params, originals, is_distributed):
        return [_whole(param, index)]
    raise _unknown(param, f"a tensor in place of {len(originals)} parameters, the first {_describe(trainable)}")


def _index_of_replacement(place: int, params: Sequence[torch.Tensor], originals: Sequence[Original]) -> int:
    """Index of what is none of the parameters that the group was made with: of the one it replaces, or a new one."""
    if place < len(originals):
        replaced = originals[place].reference()
        if replaced is None or not any(param is replaced for param in params):
            return place
    return len(originals)


def _may_hold_others(
    param: torch.Tensor, params: Sequence[torch.Tensor], originals: Sequence[Original], is_distributed: bool
) -> bool:
    """Whether a tensor may be a flat one that wrappers made of parameters."""
    # Matrices are gone from the group, and it is large enough for one of them, or, of several processes, for a piece
    present = {id(other) for other in params}
    gone = [original for original in originals if id(original.reference()) not in present]
    return any((o.ndim or 0) > 1 and (is_distributed or (o.numel or 0) <= param.numel()) for o in gone)


def _whole(param: torch.Tensor, place: int) -> Shard:
    return Shard(place, tuple(param.shape), 0, 0, param.numel())


def _unknown(param: torch.Tensor, found: str) -> UnknownShardsError:
    return UnknownShardsError(
        f"The optimizer was handed {found}: a {type(param).__name__} of shape {tuple(param.shape)} and dtype "
        f"{param.dtype}. Which weights lie where in it can't be read, so scale-invariant ones can't be found. Known "
        "are plain parameters, DDP, DeepSpeed ZeRO-1, 2 and 3, FSDP1, and distributed tensors that FSDP2 or tensor "
        "parallelism cuts, not both, on the first dimension. Pass "
        '`on_unknown_shards="adamw"` to go on without projection, as AdamW does.'
    )


def _describe(originals: Sequence[tuple[int, torch.Tensor]]) -> str:
    if not originals:
        return "of which is gone"
    marks = sorted(name for name in vars(originals[0][1]) if name.startswith(("ds_", "_")))
    return f"of which has shape {tuple(originals[0][1].shape)} and the attributes {marks[:12]}"


def _borders(start: int, numel: int, size: int) -> tuple[int, ...]:
    """Borders inside a weight that begins at `start` of a flat tensor cut into pieces of `size`."""
    first = (start // size + 1) * size
    return tuple(range(first - start, numel, size))


def _overlap(index: int, shape: tuple[int, ...], start: int, size: int, rank: int, process_group: Any) -> Shard:
    """Shard of a weight that begins at `start` of a flat tensor of which this process holds one piece of `size`."""
    numel = math.prod(shape)
    first, last = max(start, rank * size), min(start + numel, (rank + 1) * size)
    held = max(0, last - first)
    return Shard(
        index, shape, start=first - rank * size if held else 0, offset=first - start if held else 0, numel=held,
        borders=_borders(start, numel, size), process_group=process_group,
    )  # fmt: skip


def _distributed_tensor_shard(param: DTensor, place: int) -> Shard:
    shape, mesh = tuple(param.shape), param.device_mesh
    placements = [(dim, placement) for dim, placement in enumerate(param.placements) if mesh.size(dim) > 1]
    cut = [dim for dim, placement in placements if not isinstance(placement, Replicate)]
    local = param.to_local()
    if not cut:
        return Shard(place, shape, 0, 0, param.numel())
    placement = param.placements[cut[0]]
    if len(cut) > 1 or type(placement) is not ShardPlacement or placement.dim != 0:
        if len(shape) < 2:
            return Shard(place, tuple(local.shape), 0, 0, local.numel())
        raise _unknown(param, f"a distributed tensor with placements {param.placements}")
    # As `torch.chunk` cuts
    rows, row_size = math.ceil(shape[0] / mesh.size(cut[0])), math.prod(shape[1:])
    first = min(mesh.get_local_rank(cut[0]) * rows, shape[0])
    if local.numel() != min(rows, shape[0] - first) * row_size:
        raise _unknown(param, f"a distributed tensor whose local part has shape {tuple(local.shape)}")
    return Shard(
        place, shape, start=0, offset=first * row_size, numel=local.numel(),
        borders=tuple(range(rows * row_size, shape[0] * row_size, rows * row_size)) if row_size else (),
        process_group=mesh.get_group(cut[0]),
    )  # fmt: skip


def _fsdp1_shards(param: torch.Tensor, place: int, layout: Any) -> list[Shard]:
    """FSDP1: a flat parameter of which each process holds one piece, or a view of one weight's part of a piece."""
    shards = [
        _overlap(index, shape, start, layout.piece_size, layout.rank, layout.process_group)
        for index, (shape, start) in enumerate(layout.weights)
    ]
    if layout.place is None:
        return shards
    held = shards[layout.place]
    if held.numel != param.numel():
        raise _unknown(param, f"an FSDP1 parameter of which {held.numel} elements should be here")
    return [Shard(place, held.shape, 0, held.offset, held.numel, held.borders, held.process_group)]


def _zero12_shards(param: torch.Tensor, originals: Sequence[tuple[int, torch.Tensor]]) -> list[Shard] | None:
    """ZeRO-1 and 2 and BF16_Optimizer: the parameters are views of one buffer, of which `param` is a piece."""
    from .._upstream import zero_process_group

    process_group = zero_process_group(originals[0][1]) if originals else None
    if process_group is None:
        return None
    world_size = torch.distributed.get_world_size(process_group)
    buffer = originals[0][1].data.untyped_storage()
    found = f"a flat tensor that is not one of {world_size} equal pieces of its parameters' buffer"
    if buffer.nbytes() != param.numel() * world_size * originals[0][1].element_size():
        raise _unknown(param, found)
    rank, shards = torch.distributed.get_rank(process_group), []
    for index, original in originals:
        if original.data.untyped_storage().data_ptr() != buffer.data_ptr() or not original.is_contiguous():
            raise _unknown(param, found)
        start = int(original.data.storage_offset())
        shards.append(_overlap(index, tuple(original.shape), start, param.numel(), rank, process_group))
    return shards


def _zero3_shards(param: torch.Tensor, originals: Sequence[tuple[int, torch.Tensor]]) -> list[Shard] | None:
    """ZeRO-3: of every parameter this process has one piece, and `param` is those pieces one after the other."""
    from .._upstream import zero3_sub_group

    members = zero3_sub_group(param, originals[0][1]) if originals else None
    if members is None:
        return None
    places = {id(original): index for index, original in originals}
    shards, start = [], 0
    for member in members:
        if id(member) not in places:
            raise _unknown(param, "a ZeRO-3 sub-group with a parameter of another group")
        size, shape = member.partition_numel(), tuple(member.ds_shape)
        shard = _overlap(places[id(member)], shape, 0, size, member.ds_zero_partition_rank, member.ds_process_group)
        shards.append(Shard(shard.index, shape, start, shard.offset, shard.numel, shard.borders, shard.process_group))
        start += size
    if start != param.numel():
        raise _unknown(param, f"a ZeRO-3 sub-group of {start} elements in a tensor of another size")
    return shards


class Exchange:
    """
    One all-reduce of several vectors, started when it is made. Each process of the group takes part with vectors of
    the same sizes in the same order, zeros where it holds nothing.

    Args:
        vectors (`Sequence[torch.Tensor]`):
            One-dimensional tensors on one device, summed in float64 if one of them is, otherwise in float32.
        process_group (`torch.distributed.ProcessGroup`):
            Processes to sum over.
    """

    def __init__(self, vectors: Sequence[torch.Tensor], process_group: Any) -> None:
        dtype = torch.float64 if any(vector.dtype == torch.float64 for vector in vectors) else torch.float32
        self._sizes = [vector.numel() for vector in vectors]
        self._device = vectors[0].device
        flat = torch.cat([vector.to(dtype) for vector in vectors])
        # NCCL can't reduce on a CPU, where offloaded optimizers work
        if self._device.type == "cpu" and torch.distributed.get_backend(process_group) == "nccl":
            flat = flat.to(torch.device("cuda", torch.cuda.current_device()))
        self._sums = flat
        self._work = torch.distributed.all_reduce(flat, group=process_group, async_op=True)

    def results(self) -> list[torch.Tensor]:
        """Waits, and returns the sum of each vector on the vectors' device."""
        self._work.wait()
        return list(torch.split(self._sums.to(self._device), self._sizes))
