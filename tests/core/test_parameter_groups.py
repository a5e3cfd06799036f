"""Groups of a companion in an optimizer that a user gives, under the scheduler that they built on it."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from trl_ext.core.parameter_groups import move_to_own_groups


def given_optimizer():
    policy, masks = [nn.Parameter(torch.ones(2)) for _ in range(2)], [nn.Parameter(torch.ones(2)) for _ in range(2)]
    return torch.optim.SGD([{"params": [policy[0]], "lr": 0.1}, {"params": [policy[1]], "lr": 0.4}]), masks


def rates(optimizer, scheduler, steps=4):
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        assert scheduler.get_last_lr() == pytest.approx(found[-1])
        optimizer.step()
        scheduler.step()
    return torch.tensor(found)


SCHEDULERS = {
    "warmup from zero": lambda optimizer: LambdaLR(optimizer, lambda step: step / 4),
    "a lambda each": lambda optimizer: LambdaLR(optimizer, [lambda step: 1 - step / 8, lambda step: 1.0]),
    "step": lambda optimizer: StepLR(optimizer, 1, 0.5),
    "sequential": lambda optimizer: SequentialLR(
        optimizer, [ConstantLR(optimizer, 0.5, 2), StepLR(optimizer, 1, 0.1)], [2]
    ),
    "chained": lambda optimizer: ChainedScheduler([ConstantLR(optimizer, 0.5, 2), StepLR(optimizer, 1, 0.1)]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("learning_rate", [None, 0.03])
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_new_groups_follow_the_first_ones_schedule(name, learning_rate):
    optimizer, _ = given_optimizer()
    expected = rates(optimizer, SCHEDULERS[name](optimizer))
    optimizer, masks = given_optimizer()
    scheduler = SCHEDULERS[name](optimizer)
    move_to_own_groups(optimizer, [([masks[0]], 0.3), ([masks[1]], 0.0)], learning_rate, "masks", scheduler)
    found = rates(optimizer, scheduler)
    assert torch.equal(found[:, :2], expected)
    for place in (2, 3):
        torch.testing.assert_close(found[:, place], expected[:, 0] * (1.0 if learning_rate is None else 0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0, 0.3, 0.0]


def test_a_group_that_becomes_empty_leaves_the_scheduler_too():
    optimizer, masks = given_optimizer()
    optimizer.add_param_group({"params": masks, "lr": 0.7})
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 8)
    move_to_own_groups(optimizer, [(masks, 0.0)], None, "masks", scheduler)
    assert scheduler.base_lrs == [0.1, 0.4, 0.1]
    torch.testing.assert_close(rates(optimizer, scheduler, 2)[1], torch.tensor([0.0875, 0.35, 0.0875]))


@pytest.mark.parametrize(
    "scheduler",
    [lambda optimizer: OneCycleLR(optimizer, 0.1, 4), ReduceLROnPlateau],
    ids=["one cycle", "plateau"],
)
def test_a_scheduler_that_cannot_take_groups_in_is_refused(scheduler):
    optimizer, masks = given_optimizer()
    optimizer = torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"OneCycleLR|ReduceLROnPlateau.*optimizers=\(optimizer, None\)"):
        move_to_own_groups(optimizer, [(masks, 0.0)], None, "masks", scheduler(optimizer))
