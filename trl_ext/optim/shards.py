"""
Which slice of which weight this process holds, whatever has cut the parameters, and the sum of numbers over the
processes that hold a weight together.

An optimizer sees whole parameters under DDP, local parts of distributed tensors under FSDP2 and tensor parallelism,
one-dimensional pieces under FSDP1, and one flat tensor for a whole group of parameters under DeepSpeed's ZeRO. Each
becomes a list of [`Shard`], or of [`RowPieces`] where a weight is cut along its rows.
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
        process_group (`torch.distributed.ProcessGroup` or `tuple` of them, *optional*):
            The processes that hold the weight together; of a mesh of several dimensions one group for each dimension
            that cuts it.
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
        """Elements in a row at the channel level that follow each other here: all that the row has."""
        return math.prod(self.shape[1:])

    @property
    def whole_row_size(self) -> int:
        """Elements in a row over all processes."""
        return self.row_size

    @property
    def whole_numel(self) -> int:
        """Elements of the weight over all processes."""
        return self.num_rows * self.whole_row_size

    @property
    def cut_rows(self) -> Sequence[int]:
        """Rows that more than one process holds a part of."""
        return sorted({border // self.row_size for border in self.borders if border % self.row_size})

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The elements of a whole tensor of the weight's shape that are here, shape `(numel,)`."""
        return whole.flatten()[self.offset : self.offset + self.numel]

    def paste(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Writes the elements that are here, shape `(numel,)`, into a contiguous tensor of the weight's shape."""
        whole.view(-1)[self.offset : self.offset + self.numel] = part


@dataclass(frozen=True)
class RowPieces(Shard):
    """
    A piece of every row of a weight, or of some of its rows, as row-parallel layers cut it: along another dimension
    than the first. `offset` counts in pieces as if nothing else were in the rows, and `borders` only say that it is
    cut, since every row is.

    Args:
        region (`tuple[slice, ...]`):
            The part of the weight that is here, one slice for each dimension.
    """

    region: tuple[slice, ...] = ()

    @property
    def row_size(self) -> int:
        """Elements of each row that are here."""
        return math.prod(part.stop - part.start for part in self.region[1:])

    @property
    def whole_row_size(self) -> int:
        """Elements in a row over all processes."""
        return math.prod(self.shape[1:])

    @property
    def cut_rows(self) -> Sequence[int]:
        """Rows that more than one process holds a part of: all."""
        return range(self.num_rows)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The elements of a whole tensor of the weight's shape that are here, shape `(numel,)`."""
        return whole[self.region].flatten()

    def paste(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Writes the elements that are here, shape `(numel,)`, into a tensor of the weight's shape."""
        target = whole[self.region]
        target.copy_(part.view(target.shape))


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
        "are plain parameters, DDP, DeepSpeed ZeRO-1, 2 and 3, FSDP1, and distributed tensors of FSDP2, of tensor "
        "parallelism and of one over the other. Pass "
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
    """FSDP2 and tensor parallelism, alone or one over the other: each mesh dimension cuts one of the tensor's."""
    shape, mesh, local = tuple(param.shape), param.device_mesh, param.to_local()
    placements = [(dim, placement) for dim, placement in enumerate(param.placements) if mesh.size(dim) > 1]
    cuts: list[tuple[int, Any]] = [(dim, cut) for dim, cut in placements if not isinstance(cut, Replicate)]
    if not cuts:
        return Shard(place, shape, 0, 0, param.numel())
    if len(shape) < 2 and (len(cuts) > 1 or type(cuts[0][1]) is not ShardPlacement):
        return Shard(place, tuple(local.shape), 0, 0, local.numel())
    region, borders = [slice(0, size) for size in shape], {0}
    for dim, placement in _in_order_of_cutting(param, cuts):
        size, part = mesh.size(dim), region[placement.dim]
        if placement.dim == 0:
            borders = {border for start in borders for border in _next_borders(start, borders, shape[0], size)}
        region[placement.dim] = _chunk(part, size, mesh.get_local_rank(dim))
    expected = tuple(part.stop - part.start for part in region)
    if tuple(local.shape) != expected:
        raise _unknown(
            param, f"a distributed tensor with placements {param.placements} whose local part has shape "
            f"{tuple(local.shape)} and not {expected}"
        )  # fmt: skip
    groups = tuple(mesh.get_group(dim) for dim, _ in cuts)
    process_group = groups[0] if len(groups) == 1 else groups
    if all(getattr(placement, "dim", None) == 0 for _, placement in cuts):
        row_size = math.prod(shape[1:])
        inner = tuple(sorted(border * row_size for border in borders if 0 < border < shape[0])) if row_size else ()
        return Shard(place, shape, 0, region[0].start * row_size, local.numel(), inner, process_group)
    if not local.is_contiguous():
        raise _unknown(param, f"a distributed tensor whose local part has the strides {local.stride()}")
    offset = region[0].start * math.prod(expected[1:])
    return RowPieces(place, shape, 0, offset, local.numel(), (0,), process_group, region=tuple(region))


def _in_order_of_cutting(param: DTensor, cuts: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """The mesh dimensions that cut a tensor, each with its placement, in the order in which they did."""
    # FSDP2 over tensor parallelism stands before it in the mesh and cuts after it, which its placement tells
    strided = [(dim, placement) for dim, placement in cuts if hasattr(placement, "split_factor")]
    plain = [(dim, placement) for dim, placement in cuts if type(placement) is ShardPlacement]
    inner = [param.device_mesh.size(dim) for dim, placement in plain if strided and placement.dim == strided[0][1].dim]
    is_known = not strided or (len(strided) == 1 and math.prod(inner) == strided[0][1].split_factor)
    if len(plain) + len(strided) < len(cuts) or not is_known:
        raise _unknown(param, f"a distributed tensor with placements {param.placements}")
    return [*plain, *strided]


def _chunk(part: slice, num_chunks: int, number: int) -> slice:
    """One chunk of a stretch, as `torch.chunk` cuts it; empty where there are fewer."""
    size = math.ceil((part.stop - part.start) / num_chunks)
    start = min(part.start + number * size, part.stop)
    return slice(start, min(start + size, part.stop))


def _next_borders(start: int, borders: set[int], end: int, num_chunks: int) -> Iterator[int]:
    """Where the chunks begin of the stretch of rows from `start` to the next of `borders`, or to the `end`."""
    stretch = slice(start, min((border for border in borders if border > start), default=end))
    for number in range(num_chunks):
        yield _chunk(stretch, num_chunks, number).start


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
        group = member.ds_process_group
        shard = _overlap(places[id(member)], shape, 0, size, torch.distributed.get_rank(group), group)
        shards.append(Shard(shard.index, shape, start, shard.offset, shard.numel, shard.borders, shard.process_group))
        start += size
    if start != param.numel():
        raise _unknown(param, f"a ZeRO-3 sub-group of {start} elements in a tensor of another size")
    return shards


def groups_of(process_group: Any) -> tuple[Any, ...]:
    """The process groups of a shard, of which a mesh of several dimensions has several."""
    return process_group if isinstance(process_group, tuple) else (process_group,)


def exchange_key(process_group: Any) -> tuple[int, ...]:
    """Equal for shards whose sums are added up over the same processes."""
    return tuple(map(id, groups_of(process_group)))


class Exchange:
    """
    One all-reduce of several vectors, started when it is made. Each process of the group takes part with vectors of
    the same sizes in the same order, zeros where it holds nothing.

    Args:
        vectors (`Sequence[torch.Tensor]`):
            One-dimensional tensors on one device, summed in float64 if one of them is, otherwise in float32.
        process_group (`torch.distributed.ProcessGroup` or `tuple` of them):
            Processes to sum over; several groups one after the other.
    """

    def __init__(self, vectors: Sequence[torch.Tensor], process_group: Any) -> None:
        dtype = torch.float64 if any(vector.dtype == torch.float64 for vector in vectors) else torch.float32
        self._sizes = [vector.numel() for vector in vectors]
        self._device = vectors[0].device
        flat = torch.cat([vector.to(dtype) for vector in vectors])
        first, *self._others = groups_of(process_group)
        # NCCL can't reduce on a CPU, where offloaded optimizers work
        if self._device.type == "cpu" and torch.distributed.get_backend(first) == "nccl":
            flat = flat.to(torch.device("cuda", torch.cuda.current_device()))
        self._sums = flat
        self._work = torch.distributed.all_reduce(flat, group=first, async_op=True)

    def results(self) -> list[torch.Tensor]:
        """Waits, and returns the sum of each vector on the vectors' device."""
        self._work.wait()
        for group in self._others:
            torch.distributed.all_reduce(self._sums, group=group)
        self._others = []
        return list(torch.split(self._sums.to(self._device), self._sizes))
