"""Real training on tiny models: TRL's own trainers, ours, adapters, and the reward model at work."""

import math
import warnings

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from packaging.version import Version
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

from tests import glossary
from tests.helpers.equilibrium import ASYMMETRIC, COMMON, reward_model, trainer_of
from tests.helpers.tiny import save_tiny_model, tiny_pairs, tiny_tokenizer
from trl_ext import (
    ConstrainedPPOConfig,
    ConstrainedPPOTrainer,
    EPModelForSequenceClassification,
    EPRewardConfig,
    EPRewardTrainer,
    EPTrainer,
    EPTrainingArguments,
)
from trl_ext.equilibrium.modeling import active_head, equilibrium_model
from trl_ext.optim import AdamP
from trl_ext.optim.callbacks import bottom_optimizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trls_own_reward_trainer_trains_every_part(folder, tmp_path):
    trainer = trainer_of(RewardTrainer, folder, tmp_path / "out")
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    # A constant added to every reward leaves a pair's difference alone
    assert set(before) - moved <= {"score.readout_bias"}
    assert all(math.isfinite(loss) for loss in losses(trainer))
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_ours_equals_trls_without_homeostasis_and_has_the_metrics(folder, tmp_path):
    theirs = trainer_of(RewardTrainer, folder, tmp_path / "theirs")
    ours = trainer_of(EPRewardTrainer, folder, tmp_path / "ours")
    theirs.train()
    ours.train()
    assert losses(ours) == losses(theirs)
    entry = ours.state.log_history[0]
    assert entry["ep/free_sweeps"] >= 2 and 0 <= entry["ep/free_residual"] < 1e-4 and entry["ep/num_unconverged"] == 0
    assert "ep/weight_angle" not in entry  # symmetric
    assert "eval_ep/free_residual" in ours.evaluate()
    assert glossary.unknown(ours.state.log_history) == set()


def test_homeostasis_is_in_the_loss_and_straightens_the_weights(folder, tmp_path):
    angles = {}
    for coefficient in (0.0, 100.0):
        model = reward_model(folder, **ASYMMETRIC)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer = trainer_of(
                EPRewardTrainer, folder, tmp_path, model, homeostasis_coef=coefficient, max_steps=30, logging_steps=30
            )
            first = model.score.homeostasis_loss().item()
            trainer.train()
        assert model.config.homeostasis_coef == coefficient
        assert not any("has no effect" in str(warning.message) for warning in seen)
        angles[coefficient] = model.score.asymmetry()["ep/weight_angle"]
    entry = trainer.state.log_history[0]
    assert entry["ep/homeostasis_loss"] < first and entry["loss"] > 50 * entry["ep/homeostasis_loss"]
    assert angles[100.0] < 65 < 75 < angles[0.0]


@pytest.mark.parametrize("frozen", [False, True])
def test_head_learning_rate(frozen, folder, tmp_path):
    """At a rate of zero for the backbone the head alone moves, by its own rate, which is Adam's first step."""
    model = reward_model(folder, **ASYMMETRIC)
    model.model.requires_grad_(not frozen)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"learning_rate": 0.0, "head_learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 1}
    trainer = trainer_of(EPRewardTrainer, folder, tmp_path, model, **settings, weight_decay=0.1)
    trainer.train()
    steps = {name: (tensor - before[name]).abs().max().item() for name, tensor in model.state_dict().items()}
    # A constant added to every reward leaves a pair's difference alone, up to rounding
    expected = {name for name in steps if name.startswith("score.")}
    assert expected - {"score.readout_bias"} <= {name for name, step in steps.items() if step > 0} <= expected
    assert steps["score.forward_weight_1"] == pytest.approx(1e-2, rel=0.2)
    groups = [group for group in trainer.optimizer.param_groups if group["params"]]
    assert {(group["lr"], group["weight_decay"]) for group in groups} == (
        {(1e-2, 0.1), (1e-2, 0.0)} | (set() if frozen else {(0.0, 0.1), (0.0, 0.0)})
    )
    num_trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert sum(len(group["params"]) for group in groups) == num_trained


def test_head_learning_rate_under_lora_and_resume(folder, tmp_path):
    peft = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
    settings = {"head_learning_rate": 5e-3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = (
        trainer_of(
            EPRewardTrainer, folder, tmp_path / name, reward_model(folder, **ASYMMETRIC), peft_config=peft, **settings
        )
        for name in ("whole", "resumed")
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert {5e-3} == {group["initial_lr"] for group in resumed.optimizer.param_groups if "equilibrium_head" in group}
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_homeostasis_does_not_depend_on_accumulation(folder, tmp_path):
    found = []
    for batch, accumulated in ((4, 1), (2, 2)):
        model = reward_model(folder, **ASYMMETRIC)
        trainer = trainer_of(
            EPRewardTrainer, folder, tmp_path, model, homeostasis_coef=10.0, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated, max_steps=2, optim="sgd",
        )  # fmt: skip
        trainer.train()
        found.append(model.score.backward_weight_1.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_trls_own_trainer_with_homeostasis_warns_that_it_has_no_effect(folder, tmp_path):
    trainer = trainer_of(RewardTrainer, folder, tmp_path, reward_model(folder, homeostasis_coef=1.0, **ASYMMETRIC))
    with pytest.warns(UserWarning, match="homeostasis_coef=1.0.*no effect.*EPRewardTrainer") as seen:
        trainer.train()
    assert sum("no effect" in str(warning.message) for warning in seen) == 1


def test_transformers_own_trainer_minimises_it_through_the_models_loss(folder, tmp_path):
    torch.manual_seed(0)
    model = EPModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, hidden_features=[8, 8], homeostasis_coef=100.0, **ASYMMETRIC
    )
    rows = [{"input_ids": [3 + i, 4, 5], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(8)]
    arguments = TrainingArguments(output_dir=str(tmp_path), **{**COMMON, "max_steps": 30, "logging_steps": 30})
    Trainer(model, arguments, train_dataset=rows).train()
    assert model.score.asymmetry()["ep/weight_angle"] < 65  # from 90


def sum_of_squares(outputs, labels, num_items_in_batch=None):
    """A user's loss, over the number of labels of all accumulated batches, as transformers has it."""
    return (outputs.logits - labels.unsqueeze(1)).square().sum() / num_items_in_batch


@pytest.mark.parametrize("settings", [{"label_smoothing_factor": 0.2}, {}], ids=["smoothed labels", "own loss"])
def test_homeostasis_under_a_loss_that_is_not_the_models(settings, folder, tmp_path):
    """With the same weight, however many batches are accumulated; the coefficient's part is found by its absence."""
    rows = [{"input_ids": [3 + i, 4, 5], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(8)]
    moved = {}
    for coefficient, batch, accumulated in ((0.0, 4, 1), (10.0, 4, 1), (10.0, 2, 2)):
        torch.manual_seed(0)
        model = EPModelForSequenceClassification.from_pretrained(
            folder, num_labels=2, hidden_features=[8, 8], **ASYMMETRIC
        )
        before, objective = model.score.backward_weight_1.detach().clone(), model.score.homeostasis_loss()
        (slope,) = torch.autograd.grad(objective, model.score.backward_weight_1)
        arguments = EPTrainingArguments(str(tmp_path), **{
            **COMMON, **settings, "homeostasis_coef": coefficient, "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulated, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
        })  # fmt: skip
        loss = None if settings else sum_of_squares
        EPTrainer(model, arguments, train_dataset=rows, compute_loss_func=loss).train()
        moved[coefficient, accumulated] = model.score.backward_weight_1.detach() - before
    # transformers 5.5 with accelerate 1.10 divides the gradient of any loss by the number of accumulated batches again
    halves = Version(transformers.__version__) < Version("5.20")
    for accumulated in (1,) if halves else (1, 2):
        added = moved[10.0, accumulated] - moved[0.0, 1]
        torch.testing.assert_close(added, -10.0 * COMMON["learning_rate"] * slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [RewardTrainer, EPRewardTrainer])
def test_lora_with_the_head_among_modules_to_save(kind, folder, tmp_path):
    settings = {"homeostasis_coef": 10.0, **ASYMMETRIC} if kind is EPRewardTrainer else {}
    peft_config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
    model = reward_model(folder, **settings)
    original = model.score.readout_weight.detach().clone()
    trainer = trainer_of(kind, folder, tmp_path / "out", model, peft_config, gradient_checkpointing=True)
    trainer.train()
    head, base = active_head(trainer.model), equilibrium_model(trainer.model)
    assert head is base.score.modules_to_save["default"] and head.readout_weight.requires_grad
    assert not torch.equal(head.readout_weight, original)
    assert torch.equal(base.score.original_module.readout_weight, original)
    trainer.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("score" in name and "forward_weight_1" in name for name in saved)
    loaded = PeftModel.from_pretrained(reward_model(folder, seed=1, **settings), tmp_path / "adapter")
    trained = trainer.model.state_dict()
    kept = [name for name in trained if "lora_" in name or "modules_to_save" in name]
    assert len(kept) > 8
    for name in kept:
        assert torch.equal(loaded.state_dict()[name], trained[name]), name
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "attention_mask": torch.ones(1, 4)}
    trainer.model.eval()
    torch.testing.assert_close(loaded(**inputs).logits, trainer.model(**inputs).logits)


def test_all_linear_leaves_the_head_whole(folder, tmp_path):
    peft_config = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"])
    trainer = trainer_of(RewardTrainer, folder, tmp_path, peft_config=peft_config)
    assert not [name for name, _ in trainer.model.named_parameters() if "score" in name and "lora" in name]
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_bf16_mixed_precision_and_weights(folder, tmp_path):
    slowly = {"learning_rate": 1e-3}  # a loss that falls fast multiplies bfloat16's rounding from step to step
    expected = trainer_of(EPRewardTrainer, folder, tmp_path, **slowly)
    expected.train()
    for settings, dtype in (({"bf16": True}, torch.float32), ({}, torch.bfloat16)):
        trainer = trainer_of(
            EPRewardTrainer, folder, tmp_path, reward_model(folder, dtype=dtype), **slowly, **settings
        )
        trainer.train()
        assert trainer.model.score.forward_weight_1.dtype == torch.float32
        assert losses(trainer) == pytest.approx(losses(expected), rel=0.1)


def test_our_optimizers_need_no_registering(folder, tmp_path):
    args = EPTrainingArguments(str(tmp_path), optim="sgdp", use_cpu=True, report_to="none")
    assert args.optim == "sgdp"
    trainer = trainer_of(EPRewardTrainer, folder, tmp_path / "out", optim="adamp", optim_args="delta=0.2")
    trainer.train()
    optimizer = bottom_optimizer(trainer.optimizer)
    assert type(optimizer) is AdamP and {group["delta"] for group in optimizer.param_groups} == {0.2}


def test_resumed_run_equals_the_uninterrupted_one(folder, tmp_path):
    settings = {"homeostasis_coef": 10.0, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    finished = trainer_of(
        EPRewardTrainer, folder, tmp_path, reward_model(folder, spectral_cap=0.5, **ASYMMETRIC), **settings
    )
    finished.train()
    resumed = trainer_of(
        EPRewardTrainer,
        folder,
        tmp_path / "again",
        reward_model(folder, seed=5, spectral_cap=0.5, **ASYMMETRIC),
        **settings,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in finished.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_model_card(folder, tmp_path):
    trainer = trainer_of(
        EPRewardTrainer, folder, tmp_path, reward_model(folder, **ASYMMETRIC), homeostasis_coef=10.0,
        save_strategy="steps", save_steps=3,
    )  # fmt: skip
    trainer.train()
    text = (tmp_path / "README.md").read_text()
    assert {"trl", "trl_ext", "equilibrium-propagation", "reward-trainer"} <= set(ModelCard(text).data.tags)
    for row in ("`estimator` | holomorphic", "`num_points` | 2", "`radius` | 0.001", "`feedback` | asymmetric",
                "`feedback_angle` | 90", "`homeostasis_coef` | 10"):  # fmt: skip
        assert f"| {row} |" in text, row
    for metric in ("ep/free_residual", "ep/nudged_residual", "ep/symmetry", "ep/weight_angle"):
        assert f"| `{metric}` |" in text, metric
    assert "2309.02214" in text and "laborieux" in text and "register_auto_classes()" in text
    assert f'EPModelForSequenceClassification.from_pretrained("{tmp_path.name}")' in text


def test_model_from_a_name(folder, tmp_path):
    arguments = EPRewardConfig(
        output_dir=str(tmp_path), gradient_checkpointing=False, model_init_kwargs={"hidden_features": [8]}, **COMMON
    )
    heads = []
    for state in (1, 2):  # of the process; the head is the seed's
        torch.manual_seed(state)
        arguments.model_init_kwargs = {"hidden_features": [8]}
        trainer = EPRewardTrainer(folder, arguments, train_dataset=tiny_pairs(8))
        heads.append(trainer.model.score.input_weight.detach())
    assert torch.equal(*heads)
    assert trainer.model.config.hidden_features == [8] and trainer.model.config.num_labels == 1
    assert len(trainer.processing_class) == len(tiny_tokenizer())


def classes(folder, num_labels):
    return EPModelForSequenceClassification.from_pretrained(folder, num_labels=num_labels)


def linear(folder):
    return LlamaForSequenceClassification.from_pretrained(folder, num_labels=1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda f, o: trainer_of(EPRewardTrainer, f, o, homeostasis_coef=1.0),
            ValueError,
            "homeostasis_coef=1.0.*asymmetric",
        ),
        (lambda f, o: EPRewardConfig(o, homeostasis_coef=-1.0, **COMMON), ValueError, "homeostasis_coef.*-1"),
        (lambda f, o: EPRewardConfig(o, head_learning_rate=0.0, **COMMON), ValueError, "head_learning_rate.*0.0"),
        (
            lambda f, o: EPTrainingArguments(o, head_learning_rate=math.inf, **COMMON),
            ValueError,
            "head_learning_rate.*inf",
        ),
        (
            lambda f, o: EPTrainingArguments(o, homeostasis_coef=math.nan, **COMMON),
            ValueError,
            "homeostasis_coef.*nan",
        ),
        (lambda f, o: EPRewardTrainer(reward_model(f), RewardConfig(o, **COMMON)), TypeError, "EPRewardConfig"),
        (
            lambda f, o: EPTrainer(reward_model(f), TrainingArguments(o, use_cpu=True)),
            TypeError,
            "EPTrainingArguments",
        ),
        (
            lambda f, o: trainer_of(EPRewardTrainer, f, o, linear(f)),
            TypeError,
            "LlamaForSequenceClassification.*from_backbone",
        ),
        (lambda f, o: trainer_of(EPRewardTrainer, f, o, classes(f, 2)), ValueError, "num_labels=2"),
    ],
)
def test_wrong_input(call, error, message, folder, tmp_path):
    with pytest.raises(error, match=message):
        call(folder, str(tmp_path))


@pytest.fixture(scope="module")
def trained_reward(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "ep-reward"
    trainer = trainer_of(EPRewardTrainer, folder, path)
    trainer.train()
    trainer.save_model(str(path))
    return str(path)


def test_as_reward_in_grpo_and_constrained_ppo(folder, trained_reward, tmp_path):
    """Its rewards are those of the model called by hand on prompt and completion."""
    prompts = tiny_pairs(8).select_columns("prompt")
    common = {**COMMON, "max_completion_length": 5, "max_steps": 2, "gradient_checkpointing": False}
    grpo = GRPOTrainer(
        folder, [trained_reward], GRPOConfig(output_dir=str(tmp_path / "g"), num_generations=2, **common), prompts,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    ppo = ConstrainedPPOTrainer(
        folder,
        reward_funcs=[trained_reward],
        args=ConstrainedPPOConfig(
            output_dir=str(tmp_path / "p"), method="xi", constraints=[{"reward": "ep-reward", "threshold": 0.1}],
            **common,
        ),
        train_dataset=prompts,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    by_hand = AutoModelForSequenceClassification.from_pretrained(trained_reward)
    for trainer in (grpo, ppo):
        assert type(trainer.reward_funcs[0]) is EPModelForSequenceClassification
        assert trainer.reward_func_names == ["ep-reward"]
        trainer.train()
        assert all(math.isfinite(entry["rewards/ep-reward/mean"]) for entry in trainer.state.log_history[:2])
        text = prompts[0]["prompt"] + " a good film"
        inputs = tiny_tokenizer()(text, return_tensors="pt", return_token_type_ids=False)
        found = trainer._calculate_rewards([{}], [prompts[0]["prompt"]], [" a good film"], [[4]])
        assert found.item() == pytest.approx(by_hand(**inputs).logits.item(), abs=1e-6)
