"""Our optimizers in TRL's trainers: by name in a whole process, and through the mixins."""

import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import trl_ext
from tests.helpers.optim import TRAINING, arguments, text_data
from tests.helpers.tiny import save_tiny_model, tiny_model, tiny_pairs, tiny_tokenizer
from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer, SparsePOConfig, SparsePOTrainer, _upstream
from trl_ext.optim import (
    SGDP,
    AdamP,
    OptimizerCheckCallback,
    OptimizerMixin,
    optimizer_factory,
    register,
    unregister,
)
from trl_ext.optim.callbacks import bottom_optimizer


GENERATION = {"num_generations": 2, "max_completion_length": 4}


def unpaired(pairs):
    rows = pairs.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    return rows.add_column("label", [index % 2 == 0 for index in range(len(rows))])


def length_reward(completions, **columns):
    return [float(len(completion)) for completion in completions]


TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, {}, lambda pairs: pairs, {}),
    "kto": (KTOTrainer, KTOConfig, {}, unpaired, {}),
    "grpo": (GRPOTrainer, GRPOConfig, GENERATION, lambda pairs: pairs, {"reward_funcs": length_reward}),
    "rloo": (RLOOTrainer, RLOOConfig, GENERATION, lambda pairs: pairs, {"reward_funcs": length_reward}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", TRAINERS)
def test_mixin_trains_with_adamp(name, model, tmp_path):
    trainer_cls, config_cls, settings, data, options = TRAINERS[name]
    mixed = type("Mixed", (OptimizerMixin, trainer_cls), {})
    args = config_cls(str(tmp_path), **TRAINING, **settings)
    trainer = mixed(
        model, args=args, train_dataset=data(tiny_pairs(8)), processing_class=tiny_tokenizer(),
        optimizer_cls_and_kwargs=optimizer_factory("adamp", args, delta=0.2), **options,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    optimizer = bottom_optimizer(trainer.optimizer)
    assert type(optimizer) is AdamP
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["delta"] == 0.2 and optimizer.param_groups[0]["initial_lr"] == 1e-3
    assert any(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_mixin_refuses_two_optimizers(model, tmp_path):
    class Mixed(OptimizerMixin, DPOTrainer):
        pass

    args = DPOConfig(str(tmp_path), **TRAINING)
    own = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="`optimizers` and `optimizer_cls_and_kwargs` both"):
        Mixed(
            model, args=args, train_dataset=tiny_pairs(4), processing_class=tiny_tokenizer(), optimizers=(own, None),
            optimizer_cls_and_kwargs=optimizer_factory("adamp", args),
        )  # fmt: skip
    Mixed(model, args=args, train_dataset=tiny_pairs(4), processing_class=tiny_tokenizer())


def test_sft_takes_the_factory_itself(model, tmp_path):
    args = SFTConfig(str(tmp_path), **TRAINING)
    trainer = SFTTrainer(
        model, args=args, train_dataset=text_data(), processing_class=tiny_tokenizer(),
        optimizer_cls_and_kwargs=optimizer_factory("adamp", args), callbacks=[OptimizerCheckCallback(AdamP)],
    )  # fmt: skip
    trainer.train()
    assert type(bottom_optimizer(trainer.optimizer)) is AdamP


def test_registering_twice_and_taking_it_back(tmp_path):
    before = list(_upstream.optimizer_names())
    with pytest.raises(ValueError, match="adamp is not a valid OptimizerNames"):
        arguments(tmp_path, optim="adamp")
    register()
    register()
    args = arguments(tmp_path, optim="adamp")
    assert copy.deepcopy(args).optim == "adamp" and pickle.loads(pickle.dumps(args)).optim == "adamp"
    assert _upstream.DEFAULT_CALLBACKS.count(OptimizerCheckCallback) == 1
    unregister()
    unregister()
    assert sorted(before) == sorted(_upstream.optimizer_names())
    assert OptimizerCheckCallback not in _upstream.DEFAULT_CALLBACKS
    with pytest.raises(ValueError, match="adamp is not a valid OptimizerNames"):
        arguments(tmp_path, optim="adamp")
    with pytest.raises(ValueError, match="unsupported optimizer"):
        Trainer(tiny_model(), args).create_optimizer()
    register()
    assert arguments(tmp_path, optim="adamp").optim == "adamp"
    unregister()


def test_training_arguments_reach_a_plain_trainer(registered, tmp_path):
    args = TrainingArguments(str(tmp_path), optim="sgdp", optim_args="momentum=0.9", use_cpu=True, report_to="none")
    optimizer = Trainer(tiny_model(), args).create_optimizer()
    assert optimizer.param_groups[0]["momentum"] == 0.9 and json.loads(args.to_json_string())["optim"] == "sgdp"


def test_resumed_run_equals_the_uninterrupted_one(registered, model, tmp_path):
    def trained(folder, resume=None):
        settings = {**TRAINING, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        args = SFTConfig(str(tmp_path / folder), optim="adamp", **settings)
        trainer = SFTTrainer(model, args=args, train_dataset=text_data(), processing_class=tiny_tokenizer())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained("whole")
    resumed = trained("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def sparse_po(model, tmp_path, **settings):
    args = SparsePOConfig(str(tmp_path), optim="adamp", optim_args="wd_ratio=0.2", **{**TRAINING, **settings})
    return SparsePOTrainer(model, args=args, train_dataset=tiny_pairs(8), processing_class=tiny_tokenizer())


def names_and_callbacks():
    return _upstream.optimizer_names(), list(_upstream.DEFAULT_CALLBACKS)


def checks_of(trainer):
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, OptimizerCheckCallback)]


def test_our_own_trainers_need_no_registering(model, tmp_path):
    before = names_and_callbacks()
    trainer = sparse_po(model, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    optimizer = bottom_optimizer(trainer.optimizer)
    assert type(optimizer) is AdamP
    assert {group["wd_ratio"] for group in optimizer.param_groups} == {0.2}
    assert len(optimizer.param_groups) == 4  # the masks' own
    assert len(checks_of(trainer)) == 1 and names_and_callbacks() == before
    saved = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert saved.optim == "adamp" and names_and_callbacks() == before


def test_an_own_trainer_resumes_as_the_uninterrupted_run(model, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = (sparse_po(model, tmp_path / name, **settings) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_our_own_trainers_build_what_a_registered_name_builds(model, tmp_path):
    without = sparse_po(model, tmp_path)
    register()
    trainer = sparse_po(model, tmp_path)
    assert len(checks_of(trainer)) == 1
    found, expected = (
        [{**group, "params": [p.shape for p in group["params"]]} for group in each.create_optimizer().param_groups]
        for each in (without, trainer)
    )
    assert found == expected


def test_constrained_ppo_trains_with_sgdp(model, tmp_path):
    before = names_and_callbacks()
    settings = {**TRAINING, "max_steps": 1, "dashboard": False, "max_completion_length": 4}
    args = ConstrainedPPOConfig(str(tmp_path), optim="sgdp", optim_args="momentum=0.9", method="ppo", **settings)
    prompts = tiny_pairs(4).select_columns("prompt")
    trainer = ConstrainedPPOTrainer(model, length_reward, args, prompts, processing_class=tiny_tokenizer())
    trainer.train()
    assert type(bottom_optimizer(trainer.optimizer)) is SGDP
    assert bottom_optimizer(trainer.optimizer).param_groups[0]["momentum"] == 0.9
    assert len(checks_of(trainer)) == 1 and names_and_callbacks() == before


def test_our_own_trainers_check_the_optimizer(model, tmp_path):
    trainer = sparse_po(model, tmp_path)
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1})
    with pytest.raises(RuntimeError, match=r"SGD instead of AdamP.*Remove"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_name_in_our_own_configurations_is_a_plain_string(tmp_path):
    args = SparsePOConfig(str(tmp_path), optim="adamp", use_cpu=True, bf16=False, report_to="none")
    copies = [args, copy.deepcopy(args), pickle.loads(pickle.dumps(args)), dataclasses.replace(args, beta=0.2)]
    for each in copies:
        assert type(each.optim) is str and each.optim == "adamp"
        assert each.to_dict()["optim"] == json.loads(each.to_json_string())["optim"] == "adamp"
    assert args.optim not in (OptimizerNames.LOMO, OptimizerNames.ADAMW_TORCH_FUSED)
    other = SparsePOConfig(str(tmp_path), optim="sgd", use_cpu=True, bf16=False)
    assert other.optim is OptimizerNames.SGD
    with pytest.raises(ValueError, match="`optim='adampp'` is no optimizer; did you mean 'adamp'"):
        SparsePOConfig(str(tmp_path), optim="adampp", use_cpu=True, bf16=False)


def test_an_error_of_the_parent_leaves_the_name(tmp_path):
    args = SparsePOConfig(str(tmp_path), optim="adamp", use_cpu=True, bf16=False)
    args.eval_strategy = "sometimes"
    with pytest.raises(ValueError, match="sometimes"):
        args.__post_init__()
    assert args.optim == "adamp"


def test_trls_trainers_take_our_configurations_once_registered(model, tmp_path):
    args = SparsePOConfig(str(tmp_path), optim="adamp", **TRAINING)
    trainer = DPOTrainer(model, args=args, train_dataset=tiny_pairs(4), processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match="unsupported optimizer: adamp"):
        trainer.create_optimizer()
    register()
    assert type(trainer.create_optimizer()) is AdamP


@pytest.mark.parametrize("config_cls", [SparsePOConfig, ConstrainedPPOConfig])
def test_our_own_configurations_refuse_wrong_options(config_cls, tmp_path):
    options = {"method": "ppo"} if config_cls is ConstrainedPPOConfig else {}
    with pytest.raises(ValueError, match="`optim_args: detla=1`: AdamP has no option `detla`; did you mean `delta`"):
        config_cls(str(tmp_path), optim="adamp", optim_args="detla=1", use_cpu=True, bf16=False, **options)
    unregister()


def test_a_parser_made_after_registering_knows_the_name(registered, tmp_path):
    from trl import SFTConfig, TrlParser

    arguments = ["--optim", "adamp", "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    (args,) = TrlParser(SFTConfig).parse_args_and_config(arguments)
    assert args.optim == "adamp"


def test_recipe_lines_of_the_drop_in_guide(registered, tmp_path):
    """Read by the parser that alignment-handbook's scripts make."""
    from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

    page = Path(trl_ext.__file__).parents[1] / "docs" / "optimizers.md"
    lines = re.search(r"### alignment-handbook\n.*?```yaml\n(.*?)```", page.read_text(), re.DOTALL).group(1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(lines + f"dataset_name: none\noutput_dir: {tmp_path}\nuse_cpu: true\nbf16: false\n")
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    _, args, _ = parser.parse_args_and_config(["--config", str(recipe)])
    optimizer = Trainer(tiny_model(), args).create_optimizer()
    assert type(optimizer) is AdamP
    assert [(group["delta"], group["wd_ratio"]) for group in optimizer.param_groups] == [(0.1, 0.1)] * 2
