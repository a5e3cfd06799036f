"""Optimizers by name: factories, the trainer's groups, `optim_args`, and a user's own."""

import pytest
import torch
from transformers import Trainer

from tests.helpers.optim import arguments
from tests.helpers.tiny import tiny_model
from trl_ext.core.parameter_groups import decay_groups
from trl_ext.optim import (
    SGDP,
    AdamP,
    names,
    optimizer_factory,
    register,
    register_optimizer,
    scale_invariant_weights,
    unregister,
)
from trl_ext.optim.names import check_optim_args, parse_optim_args


@pytest.fixture
def own_names(monkeypatch):
    monkeypatch.setattr(names, "_OPTIMIZERS", dict(names._OPTIMIZERS))


def names_by_decay(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups], [g["weight_decay"] for g in groups]


@pytest.mark.parametrize(("name", "cls"), [("adamp", AdamP), ("sgdp", SGDP)])
def test_optim_names_our_optimizers(name, cls, registered, tmp_path):
    args = arguments(
        tmp_path, optim=name, optim_args="delta=0.2, wd_ratio=0.3,nesterov=true", learning_rate=3e-4,
        weight_decay=0.1, adam_beta2=0.98, adam_epsilon=1e-7,
    )  # fmt: skip
    assert args.optim == name and args.to_dict()["optim"] == name
    model = tiny_model()
    optimizer = Trainer(model, args).create_optimizer()
    assert type(optimizer) is cls
    group = optimizer.param_groups[0]
    assert (group["lr"], group["delta"], group["wd_ratio"], group["nesterov"]) == (3e-4, 0.2, 0.3, True)
    if cls is AdamP:
        assert group["betas"] == (0.9, 0.98) and group["eps"] == 1e-7
    else:
        assert group["eps"] == 1e-8  # not Adam's


def test_groups_are_the_trainers_in_every_route(registered, tmp_path):
    args = arguments(tmp_path, weight_decay=0.1)
    model = tiny_model("gpt2")  # has biases and LayerNorms
    model.lm_head.weight.requires_grad_(False)
    expected = names_by_decay(model, Trainer(model, args).create_optimizer().param_groups)
    assert expected[1] == [0.1, 0.0] and len(expected[0][1]) > 10

    by_name = Trainer(model, arguments(tmp_path, weight_decay=0.1, optim="adamp"))
    routes = [
        by_name.create_optimizer(),
        Trainer(model, args, optimizer_cls_and_kwargs=optimizer_factory("adamp", args)).create_optimizer(),
        Trainer(model, args, optimizer_cls_and_kwargs=optimizer_factory("adamp", lr=1e-3)).create_optimizer(),
        # `weight_decay` given to the factory wins over the configuration's
        Trainer(
            model, arguments(tmp_path), optimizer_cls_and_kwargs=optimizer_factory("adamp", lr=1e-3, weight_decay=0.1)
        ).create_optimizer(),
        optimizer_factory("adamp", args)(model),
        optimizer_factory("adamp", lr=1e-3, weight_decay=0.1)(model),
    ]
    for optimizer in routes:
        assert type(optimizer) is AdamP
        assert names_by_decay(model, optimizer.param_groups) == expected
    assert names_by_decay(model, decay_groups(model, 0.1)) == expected


def test_factory_takes_the_rest_from_the_configuration(tmp_path):
    args = arguments(tmp_path, learning_rate=2e-5, adam_beta1=0.8)
    optimizer = optimizer_factory("adamp", args, delta=0.3, eps=1e-6)(tiny_model())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["delta"]) == (2e-5, (0.8, 0.999), 1e-6, 0.3)


def test_factory_without_a_learning_rate_warns():
    with pytest.warns(UserWarning, match="no `lr`.*optimizer_factory\\('adamp', args\\)"):
        assert optimizer_factory("adamp").kwargs == {}


def test_factory_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'adampp'.*'adamp', 'sgdp'.*register_optimizer"):
        optimizer_factory("adampp", lr=1e-3)
    with pytest.raises(ValueError, match="AdamP has no option `detla`; did you mean `delta`"):
        optimizer_factory("adamp", lr=1e-3, detla=0.1)
    with pytest.raises(ValueError, match="delta"):
        optimizer_factory("adamp", lr=1e-3, delta=float("nan"))(tiny_model())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("delta", "'delta' is not `option=value`"),
        ("delta=", "'delta=' is not"),
        ("detla=0.1", "AdamP has no option `detla`; did you mean `delta`"),
        ("delta=0.1,delta=0.2", "'delta=0.2' is given twice"),
        ("delta=small", "`delta` must be a number, got 'small'"),
        ("nesterov=1.5", "`nesterov` must be true or false, got '1.5'"),
        ("lr=1e-3", "`lr` is set by the field `learning_rate`"),
        ("weight_decay=0.1", "set by the field `weight_decay`"),
        ("eps=1e-6", "set by the field `adam_epsilon`"),
        ("params=3", "no option `params`"),
        ("state_dtype=float99", "`state_dtype` must be a dtype of torch such as float32, got 'float99'"),
    ],
)
def test_wrong_optim_args(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_optim_args(text, AdamP)
    assert f"`optim_args: {text}`" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim_args": "delta=-0.1"}, "`delta` must be finite and at least 0, got -0.1"),
        ({"optim_args": "delta=nan"}, "`delta` must be a number, got 'nan'"),
        ({"optim_args": "wd_ratio=1e999"}, "`wd_ratio` must be finite"),
        ({"optim_args": "projection=rows"}, "`projection` must be one of"),
        ({"optim_args": "projection=(:layer"}, "pattern"),
        ({"learning_rate": -1.0}, "`lr` must be finite and at least 0, got -1.0"),
        ({"learning_rate": float("nan")}, "`lr` must be finite and at least 0, got nan"),
        ({"weight_decay": -0.1}, "`weight_decay` must be finite and at least 0, got -0.1"),
        ({"adam_beta1": 1.0}, "`betas\\[0\\]` must lie in"),
        ({"optim": "sgdp", "optim_args": "momentum=1.0"}, "`momentum`"),
    ],
)
def test_values_that_no_optimizer_takes_are_refused_before_a_model_is_loaded(settings, message, registered, tmp_path):
    args = arguments(tmp_path, **{"optim": "adamp", **settings})
    with pytest.raises(ValueError, match=message):
        check_optim_args(args)


def test_right_values_pass(registered, tmp_path):
    check_optim_args(arguments(tmp_path))
    check_optim_args(arguments(tmp_path, optim="adamp", optim_args="projection=auto,delta=0.2"))
    check_optim_args(arguments(tmp_path, optim="sgdp", optim_args="projection=q_proj:layer,momentum=0.9"))


def test_optim_args_have_types():
    parsed = parse_optim_args("delta=1e-1, wd_ratio=1,nesterov=True,foreach=false,fused=none", AdamP)
    assert parsed == {"delta": 0.1, "wd_ratio": 1, "nesterov": True, "foreach": False, "fused": None}
    assert parse_optim_args(None, AdamP) == parse_optim_args("", AdamP) == {}
    assert parse_optim_args("momentum=0.9,eps=1e-6", SGDP) == {"momentum": 0.9, "eps": 1e-6}


def test_named_projection(registered, tmp_path):
    model = tiny_model("qwen3")
    options = {
        "auto": scale_invariant_weights(model.config), "q_proj|k_proj:layer": {"q_proj|k_proj": "layer"},
        "q_proj|k_proj:head/8": {"q_proj|k_proj": "head/8"},
    }  # fmt: skip
    for value, projection in options.items():
        args = arguments(tmp_path, optim="adamp", optim_args=f"projection={value},state_dtype=float32")
        optimizer = Trainer(model, args).create_optimizer()
        assert optimizer.param_groups[0]["projection"] == projection
        assert optimizer.param_groups[0]["state_dtype"] is torch.float32
        optimizer.zero_grad()
        ids = torch.arange(3, 11).view(1, -1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with pytest.raises(ValueError, match="projection='auto'` needs the parameters' names.*weight_decay"):
        optimizer_factory("adamp", lr=1e-3, projection="auto")
    with pytest.raises(ValueError, match="'llama' are known to be scale-invariant"):
        optimizer_factory("adamp", lr=1e-3, weight_decay=0.0, projection="auto")(tiny_model("llama"))


class Own(torch.optim.SGD):
    def __init__(self, params, lr=1e-3, weight_decay=0.0, gain=1.0):
        super().__init__(params, lr=lr * gain, weight_decay=weight_decay)


def test_users_own_optimizer(own_names, registered, tmp_path):
    register_optimizer("own_sgd", Own)  # after `register`: valid at once
    args = arguments(tmp_path, optim="own_sgd", optim_args="gain=2", learning_rate=0.5)
    optimizer = Trainer(tiny_model(), args).create_optimizer()
    assert type(optimizer) is Own and optimizer.param_groups[0]["lr"] == 1.0
    assert type(optimizer_factory("own_sgd", args, gain=3.0)(tiny_model())) is Own
    unregister()
    with pytest.raises(ValueError, match="own_sgd"):
        arguments(tmp_path, optim="own_sgd")
    register_optimizer("own_sgd", torch.optim.SGD)
    register()
    assert type(Trainer(tiny_model(), arguments(tmp_path, optim="own_sgd")).create_optimizer()) is torch.optim.SGD


def test_names_that_cannot_be_given(own_names):
    with pytest.raises(ValueError, match="'adamw_torch' itself.*another name"):
        register_optimizer("adamw_torch", Own)
    with pytest.raises(ValueError, match="Own SGD.*lower-case"):
        register_optimizer("Own SGD", Own)
    with pytest.raises(TypeError, match="subclass of `torch.optim.Optimizer`"):
        register_optimizer("own", Own([torch.nn.Parameter(torch.ones(1))]))
