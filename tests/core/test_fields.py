"""Every field of every configuration refuses nonsense by name: a new field without a check fails here."""

import dataclasses
import math

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from tests.helpers.fields import OWN, TRAINING, own_fields
from trl_ext import (
    ConstrainedPPOConfig,
    EPRewardConfig,
    EPTrainingArguments,
    SparsePOConfig,
)
from trl_ext.constrained_ppo.constraints import Constraint
from trl_ext.constrained_ppo.multipliers import LagrangeMultipliers


# Of every type there is, so that a field takes few of them
NONSENSE = [
    object(), b"bytes", "nonsense", "", "nan", math.nan, math.inf, -math.inf, -1, -0.5, 10**5000, True, [], [None],
    [math.nan], {"x": None}, (1, "a"), {1, 2},
]  # fmt: skip
TEXTS = ("nonsense", "nan")
# What some of it means after all, by field
MEANT = {
    "multiplier_init": (-1, -0.5),  # a start below zero, for an equality
    "multiplier_max": (math.inf,),  # no bound
    "critic_model_name_or_path": TEXTS,
    "tokenizer_name_or_path": TEXTS,
    "critic_score_reward": TEXTS,
    "gold_reward": TEXTS,
    "text_column": TEXTS,
    "label_column": TEXTS,
    "gold_metric": TEXTS,
    "reward": (*TEXTS, ),
    "threshold": (-1, -0.5),
    "token_rewards": ([],),
    "reward_funcs": ([],),
    "constraints": ([],),
    "multiplier_anti_windup": (True,),
    "text_config": ({"x": None},),
    "relative_gain": (-1, -0.5),
}  # fmt: skip


def is_meant(name, value):
    return any(type(value) is type(meant) and value == meant for meant in MEANT.get(name, ()))


def refusal(cls, name, value, tmp_path):
    """The message that a value is refused with, or `None`; what a class takes for granted is left out."""
    settings = {**OWN[cls], name: value}
    if issubclass(cls, (SparsePOConfig, ConstrainedPPOConfig, EPTrainingArguments, EPRewardConfig)):
        settings.setdefault("output_dir", str(tmp_path))
    try:
        cls(**settings)
    except (ValueError, TypeError, StrictDataclassFieldValidationError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("cls", OWN, ids=lambda cls: cls.__name__)
def test_own_fields_refuse_nonsense_by_name(cls, tmp_path):
    accepted, unclear = [], []
    for name in own_fields(cls):
        default = next(f.default for f in dataclasses.fields(cls) if f.name == name)
        for value in NONSENSE:
            boolean = isinstance(value, bool) and isinstance(default, bool)
            if boolean or is_meant(name, value):
                continue
            message = refusal(cls, name, value, tmp_path)
            if message is None:
                accepted.append((name, repr(value)[:40] if not isinstance(value, int) else "int"))
            elif name not in message:
                unclear.append((name, message[:100]))
    assert not accepted, accepted
    assert not unclear, unclear


# Fields of TRL and transformers that take any text, or what only they can judge
THEIRS = {
    "accelerator_config", "deepspeed", "fsdp", "parallelism_config", "optim", "scale_rewards",
}  # fmt: skip


@pytest.mark.parametrize("cls", [SparsePOConfig, ConstrainedPPOConfig, EPRewardConfig], ids=lambda cls: cls.__name__)
def test_inherited_fields_refuse_other_types_and_numbers_that_are_none(cls, tmp_path):
    own, wrong = own_fields(cls), []
    for field in dataclasses.fields(cls):
        if not field.init or field.name in own or field.name in THEIRS:
            continue
        for value in (object(), math.nan, b"bytes", {1, 2}):
            message = refusal(cls, field.name, value, tmp_path)
            if message is None or field.name not in message:
                wrong.append((field.name, repr(value)[:20], message and message[:80]))
    assert not wrong, wrong


NUMBERS = {
    "learning_rate": [-1, math.inf],
    "weight_decay": [-0.1],
    "adam_beta1": [1.0, -0.1],
    "adam_epsilon": [-1e-8],
    "max_grad_norm": [-1],
    "num_train_epochs": [-1],
    "max_steps": [-2, 1.5],
    "warmup_steps": [-1],
    "gradient_accumulation_steps": [0, 1.5],
    "per_device_train_batch_size": [0, -1, True],
    "per_device_eval_batch_size": [0],
    "logging_steps": [-1],
    "eval_steps": [-1],
    "save_steps": [-1],
    "seed": [-1, 2**32, 0.5],
    "dataloader_num_workers": [-1],
    "log_level": ["loud"],
    "lr_scheduler_type": ["zigzag"],
    "eval_strategy": ["sometimes"],
    "optim": ["adamq", object(), ""],
    "output_dir": ["", "  "],
    "lr_scheduler_kwargs": ["nonsense", "{"],
    "bf16": [3, "maybe"],
}


@pytest.mark.parametrize("cls", [SparsePOConfig, ConstrainedPPOConfig, EPRewardConfig], ids=lambda cls: cls.__name__)
def test_numbers_and_choices_that_would_train_nothing(cls, tmp_path):
    more = {
        SparsePOConfig: {"max_length": [0, -1], "label_smoothing": [1.5], "truncation_mode": ["middle"]},
        ConstrainedPPOConfig: {
            "temperature": [0, -1.0], "top_p": [0, 1.5], "max_completion_length": [0], "epsilon": [-0.1],
            "num_iterations": [0], "num_generations": [0], "scale_rewards": ["std"], "generation_kwargs": ["nonsense"],
        },
        EPRewardConfig: {"max_length": [0], "center_rewards_coefficient": [-1]},
    }[cls]  # fmt: skip
    for name, values in {**NUMBERS, **more}.items():
        for value in values:
            message = refusal(cls, name, value, tmp_path)
            assert message is not None and name in message, (name, value, message)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("multiplier_update", "minibatches"), ("whitening", "stream"), ("mixing", "normalised"),
        ("critic", "seperate"), ("sat_target", "mean"), ("objective", "reward"),
    ],
)  # fmt: skip
def test_misspelt_choices_of_python_name_the_right_ones(field, value, tmp_path):
    """Each trained something else once."""
    message = refusal(ConstrainedPPOConfig, field, value, tmp_path)
    assert message.startswith(f"`{field}` must be one of ") and f"got {value!r}" in message


@pytest.mark.parametrize("name", ["lr", "squash_gradient", "window", "maximum"])
def test_settings_of_multipliers(name):
    settings = {"lr": {"learning_rate": math.inf}, "squash_gradient": {"momentum": math.nan},
                "window": {"window": 1.5}, "maximum": {"maximum": "5"}}[name]  # fmt: skip
    field = next(iter(settings)).replace("maximum", "max")
    with pytest.raises(ValueError, match=f"`multiplier_{field}` must be"):
        LagrangeMultipliers([Constraint("a", 0.5)], **settings)


@pytest.mark.parametrize("option", ["nesterov", "maximize", "capturable", "differentiable", "foreach", "fused",
                                    "stochastic_rounding", "on_unknown_shards", "lr", "eps", "delta", "wd_ratio",
                                    "weight_decay", "betas", "projection", "state_dtype"])  # fmt: skip
def test_options_of_optimizers_refuse_nonsense_by_name(option):
    import torch

    from trl_ext.optim import AdamP

    for value in (object(), "nonsense", b"x", math.nan, -1, [None], {1: 2}, 10**5000):
        if value is None or (option == "projection" and value == {}):
            continue
        with pytest.raises((ValueError, TypeError), match=option):
            AdamP([torch.nn.Parameter(torch.zeros(2, 2))], **{option: value})


def test_a_configuration_can_be_built_again_from_itself(tmp_path):
    sparse = SparsePOConfig(str(tmp_path), optim="adamp", **TRAINING)
    assert dataclasses.replace(sparse, beta=0.2).optim == sparse.optim
