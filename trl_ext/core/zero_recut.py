"""A checkpoint of DeepSpeed's ZeRO, cut anew for another number of processes.

ZeRO-1 and ZeRO-2 lay the parameters of a group one after the other, fill up to a multiple of twice the number of
processes, and give each process an equal piece. ZeRO-3 cuts every parameter by itself, each piece filled up. What all
processes have is put together without the filling, and cut again: [`recut_flat`] and [`recut_parameters`].
[`recut_checkpoint`] does it with files, which DeepSpeed then reads as its own.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from .checkpoint import load_harmless
from .status import RunError


# Elements that the pieces of a flat group are a multiple of, beside the number of processes
_ALIGNMENT = 2
_STATES = re.compile(r"(?P<prefix>(bf16_|fp16_)?zero_pp_rank_)(?P<rank>\d+)(?P<suffix>_mp_rank_00_optim_states\.pt)")
_MODEL_OF_ALL, _MODEL_OF_ONE = "mp_rank_00_model_states.pt", "zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
# Options of ZeRO under which the pieces are others
_OTHER_CUTS = (
    "round_robin_gradients", "parameter_alignment", "elastic_checkpoint", "mics_shard_size", "zero_hpz_partition_size",
)  # fmt: skip
_SUB_GROUP_SIZE = 10**9  # DeepSpeed's default
# By process, a flat tensor for each sub-group
Pieces = list[list[torch.Tensor]]


def recut_flat(pieces: Sequence[torch.Tensor], total: int, count: int) -> list[torch.Tensor]:
    """
    Cuts a flat group of ZeRO-1 or ZeRO-2 anew.

    Args:
        pieces (`Sequence[torch.Tensor]`):
            The piece of each process, `(S,)`, in the order of their ranks.
        total (`int`):
            Elements of the group without its filling.
        count (`int`):
            Number of processes to cut for.

    Returns:
        `list[torch.Tensor]`: as many pieces of equal size, filled up with zeros.

    Raises:
        RunError: If the pieces have fewer elements than the group.
    """
    whole = torch.cat(list(pieces))[:total]
    if len(whole) < total:
        raise RunError(f"its pieces have {len(whole)} of {total} elements")
    size = _piece(total, count)
    return list(pad(whole, (0, size * count - total)).split(size))


def _piece(total: int, count: int) -> int:
    """Elements of a piece of a flat group."""
    return -(-total // (_ALIGNMENT * count)) * _ALIGNMENT


def recut_parameters(
    pieces: Sequence[Sequence[torch.Tensor]],
    sub_groups: Sequence[Sequence[int]],
    cut: Sequence[Sequence[int]],
    count: int,
) -> list[list[torch.Tensor]]:
    """
    Cuts the parameters of a group of ZeRO-3 anew.

    Args:
        pieces (`Sequence[Sequence[torch.Tensor]]`):
            For each process, a flat tensor for each sub-group: the pieces of its parameters one after the other.
        sub_groups (`Sequence[Sequence[int]]`):
            Elements of each parameter of each sub-group.
        cut (`Sequence[Sequence[int]]`):
            The same parameters in the sub-groups that the new pieces are to have.
        count (`int`):
            Number of processes to cut for.

    Returns:
        `list[list[torch.Tensor]]`: for each of the new processes, a flat tensor for each of the new sub-groups.

    Raises:
        RunError: If a piece is not as large as its parameters make it.
    """
    whole: list[torch.Tensor] = []
    for index, numels in enumerate(sub_groups):
        sizes = [-(-numel // len(pieces)) for numel in numels]
        if any(len(of_rank[index]) != sum(sizes) for of_rank in pieces):
            raise RunError(f"a piece has {len(pieces[0][index])} elements and its parameters make {sum(sizes)}")
        parts = zip(*(of_rank[index].split(sizes) for of_rank in pieces), strict=True)
        whole += [torch.cat(part)[:numel] for part, numel in zip(parts, numels, strict=True)]
    rows = [pad(one, (0, -len(one) % count)).view(count, -1) for one in whole]
    groups, begin = [], 0
    for numels in cut:
        groups.append(torch.cat(rows[begin : begin + len(numels)], dim=1))
        begin += len(numels)
    return [[group[rank].clone() for group in groups] for rank in range(count)]


def sub_groups_of(numels: Sequence[int], count: int, size: int) -> list[list[int]]:
    """
    Cuts the parameters of a group into the sub-groups of ZeRO-3: each ends with the parameter that fills it.

    Args:
        numels (`Sequence[int]`):
            Elements of each parameter.
        count (`int`):
            Number of processes.
        size (`int`):
            Elements of a process at which a sub-group is full, `sub_group_size`.

    Returns:
        `list[list[int]]`
    """
    found: list[list[int]] = [[]]
    held = 0
    for numel in numels:
        if held >= size:
            found.append([])
            held = 0
        found[-1].append(numel)
        held += -(-numel // count)
    return found


def num_pieces(checkpoint: Path) -> int:
    """For how many processes DeepSpeed has cut a checkpoint; 0 for one that is not DeepSpeed's."""
    return sum(_STATES.fullmatch(path.name) is not None for path in checkpoint.glob("global_step*/*"))


def recut_checkpoint(checkpoint: Path, folder: Path, count: int) -> None:
    """
    Makes a folder that DeepSpeed reads as a checkpoint of another number of processes.

    Args:
        checkpoint (`Path`):
            The checkpoint.
        folder (`Path`):
            Made anew: links to the files of the checkpoint, and DeepSpeed's own, cut anew.
        count (`int`):
            Number of processes to cut for.

    Raises:
        RunError: If it cannot be done, with the reason.
        OSError: If something cannot be written.
    """
    tag = (checkpoint / "latest").read_text().strip()
    source, target = checkpoint / tag, folder / tag
    shutil.rmtree(folder, ignore_errors=True)
    target.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.name != tag:
            (folder / path.name).symlink_to(path.resolve())
    found = {int(match["rank"]): match for path in source.iterdir() if (match := _STATES.fullmatch(path.name))}
    of_one = (source / _MODEL_OF_ONE.format(rank=0)).is_file()  # ZeRO-3's
    models = (
        [source / _MODEL_OF_ONE.format(rank=rank) for rank in sorted(found)] if of_one else [source / _MODEL_OF_ALL]
    )
    if sorted(found) != list(range(len(found))) or not found or not all(path.is_file() for path in models):
        raise RunError("the files of some of its processes are not here")
    states = [load_harmless(source / found[rank][0]) for rank in range(len(found))]
    weights = [load_harmless(path) for path in models]
    if weights[0]["dp_world_size"] != len(found):
        raise RunError(f"{len(found)} of {weights[0]['dp_world_size']} pieces of the optimizer's state are here")
    _refuse_other_cuts(states[0])
    cut = _recut_stage_3 if of_one else _recut_stage_2
    shapes = [[prod(shape) for shape in group.values()] for group in weights[0]["param_shapes"]]
    for rank, optimizer in enumerate(cut(states, shapes, count)):
        name = f"{found[0]['prefix']}{rank}{found[0]['suffix']}"
        torch.save({**states[0], "optimizer_state_dict": optimizer}, target / name)
    for rank in range(count if of_one else 1):
        frozen = _recut_frozen(weights, rank, count) if of_one else {}
        name = _MODEL_OF_ONE.format(rank=rank) if of_one else _MODEL_OF_ALL
        torch.save({**weights[0], **frozen, "dp_world_size": count}, target / name)


def _refuse_other_cuts(state: dict[str, Any]) -> None:
    zero, optimizer = state["ds_config"].get("zero_optimization", {}), state["optimizer_state_dict"]
    for option in _OTHER_CUTS:
        value = zero.get(option)
        if value is True or (value is not None and value > 1):
            raise RunError(f"`{option}` cuts in another way")
    if not any(isinstance(optimizer.get(key), dict) for key in ("base_optimizer_state", "optimizer_state_dict")):
        raise RunError("the optimizer's state has another form than that of ZeRO-2 and ZeRO-3")


def _recut_stage_2(states: list[dict[str, Any]], shapes: list[list[int]], count: int) -> Iterator[dict[str, Any]]:
    """What each of the new processes has of the optimizer, under ZeRO-1 and ZeRO-2."""
    optimizer = [state["optimizer_state_dict"] for state in states]
    base, totals = [state["base_optimizer_state"] for state in optimizer], [sum(numels) for numels in shapes]
    weights, held = [], []
    for index, total in enumerate(totals):
        recut = partial(_recut_one_flat, total=total, count=count)
        weights.append(recut([[one["single_partition_of_fp32_groups"][index]] for one in optimizer]))
        before = [[one["state"].get(index, {})] for one in base]
        held.append(_recut_states(before, [_piece(total, len(base))], recut, weights[-1]))
    for rank in range(count):
        pieces = [one[rank][0] for one in weights]
        filled = [
            min(max(0, (rank + 1) * len(piece) - total), len(piece))
            for piece, total in zip(pieces, totals, strict=True)
        ]
        yield {
            **{key: value for key, value in optimizer[0].items() if key != "param_slice_mappings"},
            "base_optimizer_state": {**base[0], "state": {index: one[rank][0] for index, one in enumerate(held)}},
            "single_partition_of_fp32_groups": [
                piece[: len(piece) - filling].clone() for piece, filling in zip(pieces, filled, strict=True)
            ],
            "group_paddings": filled,
            "partition_count": [count] * len(totals),
        }


def _recut_one_flat(pieces: Pieces, total: int, count: int) -> Pieces:
    return [[piece.clone()] for piece in recut_flat([only for (only,) in pieces], total, count)]


def _recut_stage_3(states: list[dict[str, Any]], shapes: list[list[int]], count: int) -> Iterator[dict[str, Any]]:
    """What each of the new processes has of the optimizer, under ZeRO-3."""
    optimizer = [state["optimizer_state_dict"] for state in states]
    base = [state["optimizer_state_dict"] for state in optimizer]
    size = int(states[0]["ds_config"]["zero_optimization"].get("sub_group_size", _SUB_GROUP_SIZE))
    groups: list[dict[str, Any]] = []
    weights: Pieces = [[] for _ in range(count)]
    held: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    for group in base[0]["param_groups"]:  # whose parameters are the numbers of its sub-groups
        numbers = group["params"]
        before = [shapes[number] for number in numbers]
        cut = sub_groups_of([numel for numels in before for numel in numels], count, size)
        recut = partial(recut_parameters, sub_groups=before, cut=cut, count=count)
        groups.append({**group, "params": list(range(len(weights[0]), len(weights[0]) + len(cut)))})
        fp32 = [[one["fp32_flat_groups"][number] for number in numbers] for one in optimizer]
        new = recut(fp32)
        of_group = [[one["state"].get(number, {}) for number in numbers] for one in base]
        for rank, one in enumerate(_recut_states(of_group, [len(piece) for piece in fp32[0]], recut, new)):
            weights[rank] += new[rank]
            held[rank] += one
    for rank in range(count):
        yield {
            **optimizer[0],
            "partition_count": count,
            "optimizer_state_dict": {"state": dict(enumerate(held[rank])), "param_groups": groups},
            "fp32_flat_groups": weights[rank],
        }


def _recut_states(
    before: list[list[dict[str, Any]]], lengths: list[int], recut: Callable[[Pieces], Pieces], like: Pieces
) -> list[list[dict[str, Any]]]:
    """What the optimizer has of the sub-groups of a group, by process: averages are cut, counts of steps are kept."""
    kept, cut = {}, {}
    for key, value in before[0][0].items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            kept[key] = value
        elif [len(state[key].flatten()) for state in before[0]] == lengths:
            cut[key] = recut([[state[key].flatten() for state in of_rank] for of_rank in before])
        else:
            raise RunError(f"`{key}` of the optimizer's state is not cut as its weights are")
    return [
        [{**kept, **{key: new[rank][index] for key, new in cut.items()}} for index in range(len(pieces))]
        for rank, pieces in enumerate(like)
    ]


def _recut_frozen(weights: list[dict[str, Any]], rank: int, count: int) -> dict[str, Any]:
    """Pieces of the parameters that are not trained, under ZeRO-3, where the checkpoint has them."""
    if not weights[0].get("frozen_param_fragments"):
        return {}
    fragments = [one["frozen_param_fragments"] for one in weights]
    shapes = weights[0]["frozen_param_shapes"]
    found = {}
    for name, shape in shapes.items():
        numels = [[prod(shape)]]
        found[name] = recut_parameters([[one[name]] for one in fragments], numels, numels, count)[rank][0]
    return {"frozen_param_fragments": found}
