"""ZeRO's pieces cut for another number of processes, against cuts made element by element."""

import pytest
import torch

from trl_ext.core.status import RunError
from trl_ext.core.zero_recut import num_pieces, recut_checkpoint, recut_flat, recut_parameters, sub_groups_of


def flat_by_hand(total, count):
    """Pieces of 0, 1, 2, ... as ZeRO-2 lays them: a multiple of twice the processes, the rest zeros."""
    length = total
    while length % (2 * count):
        length += 1
    return [
        torch.tensor([float(index) if index < total else 0.0 for index in range(begin, begin + length // count)])
        for begin in range(0, length, length // count)
    ]


def parameters_by_hand(groups, count):
    """By process, sub-group after sub-group, ZeRO-3's pieces of parameters that hold 1, 2, 3, ..."""
    found, number = [[[] for _ in groups] for _ in range(count)], 0.0
    for index, numels in enumerate(groups):
        for numel in numels:
            values = [number + one + 1 for one in range(numel)]
            number += numel
            while len(values) % count:
                values.append(0.0)
            for rank in range(count):
                size = len(values) // count
                found[rank][index] += values[rank * size : (rank + 1) * size]
    return [[torch.tensor(values) for values in of_rank] for of_rank in found]


@pytest.mark.parametrize("total", [1, 2, 7, 8, 13])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2), (4, 4)])
def test_flat_groups(total, before, after):
    found, expected = recut_flat(flat_by_hand(total, before), total, after), flat_by_hand(total, after)
    assert len(found) == len(expected) == after
    assert all(map(torch.equal, found, expected))
    lean = torch.cat(flat_by_hand(total, before))[:total].split(len(flat_by_hand(total, before)[0]))
    assert all(map(torch.equal, recut_flat(lean, total, after), expected))  # the weights are kept without the filling


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_parameters_in_sub_groups(before, after):
    groups, cut = [[3, 1, 8], [5]], [[3, 1], [8, 5]]
    found = recut_parameters(parameters_by_hand(groups, before), groups, cut, after)
    for of_rank, expected in zip(found, parameters_by_hand(cut, after), strict=True):
        assert all(map(torch.equal, of_rank, expected)) and len(of_rank) == len(expected)


def test_sub_groups_end_with_the_parameter_that_fills_them():
    assert sub_groups_of([4, 4, 4, 4], count=1, size=8) == [[4, 4], [4, 4]]
    assert sub_groups_of([4, 4, 4, 4], count=2, size=8) == [[4, 4, 4, 4]]
    assert sub_groups_of([5, 1, 1], count=2, size=3) == [[5], [1, 1]]
    assert sub_groups_of([20], count=1, size=8) == [[20]]


def test_pieces_of_another_size_are_refused():
    with pytest.raises(RunError, match="3 of 4 elements"):
        recut_flat([torch.zeros(3)], 4, 2)
    with pytest.raises(RunError, match="a piece has 3 elements and its parameters make 4"):
        recut_parameters([[torch.zeros(3)]], [[4]], [[4]], 2)


def saved(folder, **zero):
    """A checkpoint of DeepSpeed with one parameter of three elements, of two processes."""
    pieces, folder = folder / "global_step1", folder
    pieces.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    (folder / "trainer_state.json").write_text("{}")
    state = {
        "base_optimizer_state": {"state": {0: {"step": 4, "m": torch.ones(2)}}, "param_groups": [{"params": [0]}]},
        "param_alignment_paddings": [],
    }
    for rank, weights in enumerate(([1.0, 2.0], [3.0])):
        one = {**state, "single_partition_of_fp32_groups": [torch.tensor(weights)]}
        content = {"ds_config": {"zero_optimization": zero}, "optimizer_state_dict": one}
        torch.save(content, pieces / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    model = {"dp_world_size": 2, "param_shapes": [{"weight": torch.Size([3])}]}
    torch.save(model, pieces / "mp_rank_00_model_states.pt")
    return folder


def test_files(tmp_path):
    checkpoint = saved(tmp_path / "checkpoint-1")
    assert num_pieces(checkpoint) == 2 and num_pieces(tmp_path) == 0
    recut_checkpoint(checkpoint, tmp_path / "cut", 1)
    assert (tmp_path / "cut" / "trainer_state.json").read_text() == "{}"
    (path,) = (tmp_path / "cut" / "global_step1").glob("*optim_states.pt")
    optimizer = torch.load(path)["optimizer_state_dict"]
    assert optimizer["single_partition_of_fp32_groups"][0].tolist() == [1, 2, 3]
    assert optimizer["base_optimizer_state"]["state"][0]["m"].tolist() == [1, 1, 1, 0]
    assert optimizer["base_optimizer_state"]["state"][0]["step"] == 4 and optimizer["group_paddings"] == [1]
    assert torch.load(path.with_name("mp_rank_00_model_states.pt"))["dp_world_size"] == 1


def test_what_cannot_be_cut_says_why(tmp_path):
    with pytest.raises(RunError, match="`round_robin_gradients` cuts in another way"):
        recut_checkpoint(saved(tmp_path / "a", round_robin_gradients=True), tmp_path / "cut", 1)
    checkpoint = saved(tmp_path / "b")
    (checkpoint / "global_step1" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(RunError, match="1 of 2 pieces of the optimizer's state are here"):
        recut_checkpoint(checkpoint, tmp_path / "cut", 1)
    (checkpoint / "global_step1" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(RunError, match="the files of some of its processes are not here"):
        recut_checkpoint(checkpoint, tmp_path / "cut", 1)
