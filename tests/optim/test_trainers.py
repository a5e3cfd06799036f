"""TRL's trainers with our optimizers: the mixin, the check and the report."""

import json

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
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

from tests.helpers.tiny import save_tiny_model, tiny_pairs, tiny_tokenizer
from trl_ext import ConstrainedPPOConfig, SparsePOConfig, SparsePOTrainer
from trl_ext.optim import (
    AdamP,
    OptimizerCheckCallback,
    OptimizerMixin,
    OptimizerReportCallback,
    optimizer_factory,
    register,
    unregister,
)
from trl_ext.optim.optimizer_check_callback import bottom_optimizer
from trl_ext.optim.optimizer_report_callback import report_metrics


SETTINGS = {
    "max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "per_device_train_batch_size": 2, "logging_steps": 1, "weight_decay": 0.1, "learning_rate": 1e-3,
}  # fmt: skip
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


@pytest.fixture
def registered():
    register()
    yield
    unregister()


@pytest.mark.parametrize("name", TRAINERS)
def test_mixin_trains_with_adamp(name, model, tmp_path):
    trainer_cls, config_cls, settings, data, options = TRAINERS[name]
    mixed = type("Mixed", (OptimizerMixin, trainer_cls), {})
    args = config_cls(str(tmp_path), **SETTINGS, **settings)
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

    args = DPOConfig(str(tmp_path), **SETTINGS)
    own = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="`optimizers` and `optimizer_cls_and_kwargs` both"):
        Mixed(
            model, args=args, train_dataset=tiny_pairs(4), processing_class=tiny_tokenizer(), optimizers=(own, None),
            optimizer_cls_and_kwargs=optimizer_factory("adamp", args),
        )  # fmt: skip
    Mixed(model, args=args, train_dataset=tiny_pairs(4), processing_class=tiny_tokenizer())


def text_data():
    return tiny_pairs(8).select_columns(["chosen"]).rename_column("chosen", "text")


def test_sft_takes_the_factory_itself(model, tmp_path):
    args = SFTConfig(str(tmp_path), **SETTINGS)
    trainer = SFTTrainer(
        model, args=args, train_dataset=text_data(), processing_class=tiny_tokenizer(),
        optimizer_cls_and_kwargs=optimizer_factory("adamp", args), callbacks=[OptimizerCheckCallback(AdamP)],
    )  # fmt: skip
    trainer.train()
    assert type(bottom_optimizer(trainer.optimizer)) is AdamP


def test_another_optimizer_than_asked_for_is_refused_before_the_first_step(model, registered, tmp_path):
    args = SFTConfig(str(tmp_path), optim="adamp", **SETTINGS)
    trainer = SFTTrainer(
        model, args=args, train_dataset=text_data(), processing_class=tiny_tokenizer(),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"SGD instead of AdamP \(AcceleratedOptimizer -> SGD\).*Remove"):
        trainer.train()
    assert trainer.state.global_step == 0
    args = SFTConfig(str(tmp_path), **SETTINGS)
    trainer = SFTTrainer(model, args=args, train_dataset=text_data(), processing_class=tiny_tokenizer())
    trainer.add_callback(OptimizerCheckCallback(AdamP))
    with pytest.raises(RuntimeError, match="AdamW instead of AdamP"):
        trainer.train()


def test_check_leaves_other_trainers_alone(model, registered, tmp_path):
    args = SFTConfig(str(tmp_path), **SETTINGS)
    trainer = SFTTrainer(model, args=args, train_dataset=text_data(), processing_class=tiny_tokenizer())
    trainer.train()
    assert trainer.state.global_step == 2


def test_our_own_configurations_register(model, tmp_path):
    unregister()
    args = SparsePOConfig(str(tmp_path), optim="adamp", optim_args="wd_ratio=0.2", **SETTINGS)
    trainer = SparsePOTrainer(model, args=args, train_dataset=tiny_pairs(8), processing_class=tiny_tokenizer())
    trainer.train()
    optimizer = bottom_optimizer(trainer.optimizer)
    assert type(optimizer) is AdamP
    assert {group["wd_ratio"] for group in optimizer.param_groups} == {0.2}
    assert len(optimizer.param_groups) == 4  # the masks' own
    unregister()
    ppo = ConstrainedPPOConfig(str(tmp_path), optim="sgdp", method="ppo", use_cpu=True, bf16=False)
    assert ppo.optim == "sgdp"
    unregister()


@pytest.mark.parametrize("config_cls", [SparsePOConfig, ConstrainedPPOConfig])
def test_our_own_configurations_refuse_wrong_options(config_cls, tmp_path):
    options = {"method": "ppo"} if config_cls is ConstrainedPPOConfig else {}
    with pytest.raises(ValueError, match="`optim_args: detla=1`: AdamP has no option `detla`; did you mean `delta`"):
        config_cls(str(tmp_path), optim="adamp", optim_args="detla=1", use_cpu=True, bf16=False, **options)
    unregister()


def test_resumed_run_equals_the_uninterrupted_one(registered, model, tmp_path):
    def trained(folder, resume=None):
        settings = {**SETTINGS, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        args = SFTConfig(str(tmp_path / folder), optim="adamp", **settings)
        trainer = SFTTrainer(model, args=args, train_dataset=text_data(), processing_class=tiny_tokenizer())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained("whole")
    resumed = trained("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_training_arguments_reach_a_plain_trainer(registered, tmp_path):
    args = TrainingArguments(str(tmp_path), optim="sgdp", optim_args="momentum=0.9", use_cpu=True, report_to="none")
    from tests.helpers.tiny import tiny_model

    optimizer = Trainer(tiny_model(), args).create_optimizer()
    assert optimizer.param_groups[0]["momentum"] == 0.9 and json.loads(args.to_json_string())["optim"] == "sgdp"


def test_report_is_logged_before_reporters_see_the_log(registered, tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    model = save_tiny_model(tmp_path / "model", "qwen3")
    args = SFTConfig(str(tmp_path), optim="adamp", optim_args="projection=auto", **SETTINGS)
    trainer = SFTTrainer(
        model, args=args, train_dataset=text_data(), processing_class=tiny_tokenizer(), callbacks=[Reporter()]
    )
    OptimizerReportCallback.attach(trainer)
    trainer.train()
    logs = [entry for entry in seen if "loss" in entry]
    assert len(logs) == 2
    for entry, kept in zip(logs, [e for e in trainer.state.log_history if "loss" in e], strict=True):
        assert entry["optimizer/projected/weights"] == 4.0  # queries and keys of two layers
        assert entry["optimizer/projected/share"] == pytest.approx(4 / 16)
        assert 0 < entry["optimizer/projected/effective_step_size"] < 1
        assert entry["optimizer/other/weight_norm"] > 0
        assert kept["optimizer/projected/share"] == entry["optimizer/projected/share"]
    report = json.loads((tmp_path / "optimizer_report.json").read_text())
    assert report["model.layers.1.self_attn.k_proj.weight"]["layer"] == 1.0


def test_report_of_another_optimizer_is_empty(model, tmp_path):
    args = SFTConfig(str(tmp_path), **SETTINGS)
    trainer = SFTTrainer(model, args=args, train_dataset=text_data(), processing_class=tiny_tokenizer())
    OptimizerReportCallback.attach(trainer)
    trainer.train()
    assert not any("optimizer/projected/share" in entry for entry in trainer.state.log_history)
    assert not (tmp_path / "optimizer_report.json").exists()


def test_report_metrics_by_hand():
    report = {
        "often": {"steps": 4, "channel": 0.25, "layer": 0.5, "weight_norm": 2.0, "effective_step_size": 0.1},
        "rarely": {"steps": 4, "channel": 0.0, "layer": 0.25, "weight_norm": 4.0, "effective_step_size": 0.3},
        "zero": {"steps": 4, "channel": 0.0, "layer": 0.0, "weight_norm": 0.0, "effective_step_size": float("nan")},
    }
    assert report_metrics(report) == {
        "optimizer/projected/share": pytest.approx(1 / 3),
        "optimizer/projected/weights": 1.0,
        "optimizer/projected/weight_norm": 2.0,
        "optimizer/projected/effective_step_size": 0.1,
        "optimizer/other/weight_norm": 4.0,
        "optimizer/other/effective_step_size": 0.3,
    }
    assert report_metrics({}) == {}
