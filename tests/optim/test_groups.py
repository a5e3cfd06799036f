"""Ordinary edits of a group, lazy parameters, and checkpoints of other optimizers and options."""

import copy
import logging
import warnings

import pytest
import torch

from tests.helpers.optim import params_of
from trl_ext.optim import SGDP, AdamP


def stepped(optimizer, params):
    """What a step changes, with gradients that follow from the shapes."""
    for param in params:
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel())).to(param.dtype)
    optimizer.step()


@pytest.mark.parametrize(("cls", "options"), [(AdamP, {}), (SGDP, {"momentum": 0.9})])
def test_whole_parameters_need_no_place_in_a_list(cls, options):
    """Appended, inserted, re-ordered and left out, each step as an optimizer that was built so."""
    params, copies = params_of((4, 3), (3,), (5, 4)), params_of((4, 3), (3,), (5, 4))
    added, added_copies = params_of((7, 2), (7,)), params_of((7, 2), (7,))
    optimizer = cls(params, lr=0.1, **options)
    reference = [cls([copy], lr=0.1, **options) for copy in (*copies, *added_copies)]
    for order in ([0, 1, 2], [0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [4, 2, 1]):
        optimizer.param_groups[0]["params"] = [[*params, *added][place] for place in order]
        stepped(optimizer, optimizer.param_groups[0]["params"])
        for place in order:
            stepped(reference[place], reference[place].param_groups[0]["params"])
        for one, other in zip([*params, *added], [*copies, *added_copies], strict=True):
            torch.testing.assert_close(one, other)
    report = optimizer.report()
    assert {name: row["steps"] for name, row in report.items()} == {"0.0": 3, "0.2": 4, "0.3": 2}


def test_names_stay_with_their_weights():
    names = ["first.q_proj", "second.mlp", "third.q_proj", "fourth.mlp"]
    params = params_of(*[(4, 3)] * 4)
    optimizer = AdamP(zip(names, params, strict=True), projection={"q_proj": "layer"})
    stepped(optimizer, params)
    del optimizer.param_groups[0]["params"][0]
    stepped(optimizer, params[1:])
    report = {name: (row["steps"], row["layer"]) for name, row in optimizer.report().items()}
    assert report == dict(zip(names, [(1, 1.0), (0, 0.0), (2, 1.0), (0, 0.0)], strict=True))
    # With its name, or a clear error
    (new,) = params_of((4, 3))
    optimizer.param_groups[0]["params"].append(new)
    with pytest.raises(ValueError, match="`projection` has patterns, but a parameter has no name"):
        stepped(optimizer, [*params[1:], new])
    optimizer.param_groups[0]["param_names"] = [*names[1:], "fifth.q_proj"]
    optimizer = AdamP(zip(names, params, strict=True), projection={"q_proj": "layer"})
    optimizer.param_groups[0]["params"].append(new)
    optimizer.param_groups[0]["param_names"].append("fifth.q_proj")
    stepped(optimizer, [*params, new])
    assert optimizer.report()["fifth.q_proj"]["layer"] == 1


def test_lazy_layers():
    layer = torch.nn.LazyLinear(4)
    optimizer = AdamP(layer.named_parameters(), lr=0.1)
    layer(torch.ones(2, 3)).sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert (layer.weight != before).all() and optimizer.report()["weight"]["steps"] == 1


def test_adamw_checkpoint_is_taken_over(caplog):
    ours, theirs = params_of((4, 3), (3,)), params_of((4, 3), (3,))
    adamw = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.01)
    for _ in range(3):
        stepped(adamw, theirs)
    optimizer = AdamP(ours, lr=0.1, weight_decay=0.01, projection="none")
    with caplog.at_level(logging.WARNING):
        optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    assert caplog.text.count("takes over the running averages") == 1 and "`nesterov`" in caplog.text
    for one, other in zip(ours, theirs, strict=True):
        one.data.copy_(other.data)
    stepped(adamw, theirs)
    stepped(optimizer, ours)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"SGDP can't go on from this checkpoint.*\['momentum'\].*without its optim"):
        SGDP(ours, lr=0.1, momentum=0.9).load_state_dict(adamw.state_dict())
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    stepped(sgd, theirs)
    sgdp = SGDP(ours, lr=0.1, momentum=0.9)
    sgdp.load_state_dict(sgd.state_dict())
    assert torch.equal(sgdp.state[ours[0]]["momentum"], sgd.state[theirs[0]]["momentum_buffer"])
    with pytest.raises(ValueError, match="AdamP can't go on"):
        AdamP(ours).load_state_dict(sgd.state_dict())


def test_options_that_lose_against_the_checkpoint_are_named():
    params = params_of((4, 3))
    first = AdamP(params, lr=0.1, weight_decay=0.1)
    torch.optim.lr_scheduler.LambdaLR(first, lambda step: 0.5)
    stepped(first, params)
    saved = first.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = AdamP(params, lr=0.1, weight_decay=0.1)
        same.load_state_dict(saved)
    changed = AdamP(params, lr=0.2, weight_decay=0.1, delta=0.3)
    with pytest.warns(UserWarning, match=r"`delta` is 0.1 as in the checkpoint, not 0.3 as configured; `lr` is 0.1"):
        changed.load_state_dict(saved)
    assert changed.param_groups[0]["delta"] == 0.1


def test_load_hooks_reach_the_running_averages():
    params = params_of((4, 3), dtype=torch.bfloat16)
    optimizer = AdamP(params, state_dtype=torch.float32)
    stepped(optimizer, params)
    saved = optimizer.state_dict()

    def doubled(_, state_dict):
        states = {key: {**state, "exp_avg": 2 * state["exp_avg"]} for key, state in state_dict["state"].items()}
        return {**state_dict, "state": states}

    again = AdamP(params, state_dtype=torch.float32)
    again.register_load_state_dict_pre_hook(doubled)
    again.load_state_dict(saved)
    assert torch.equal(again.state[params[0]]["exp_avg"], 2 * saved["state"][0]["exp_avg"])


def test_positional_arguments_are_torchs():
    ours = SGDP(params_of((2, 2)), 0.1, 0.9, 0.5, 0.01).param_groups[0]
    theirs = torch.optim.SGD(params_of((2, 2)), 0.1, 0.9, 0.5, 0.01).param_groups[0]
    names = ("lr", "momentum", "dampening", "weight_decay")
    assert [ours[name] for name in names] == [theirs[name] for name in names] == [0.1, 0.9, 0.5, 0.01]
    with pytest.raises(TypeError, match="positional"):
        SGDP(params_of((2, 2)), 0.1, 0.9, 0.5, 0.01, False, 1e-8)
    assert SGDP([{"params": params_of((2, 2)), "lr": 0.3}]).param_groups[0]["lr"] == 0.3
