"""The equilibrium head as critic of constrained PPO."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers.constrained_ppo import low_ids, prompts, rollout
from tests.helpers.tiny import save_tiny_model, tiny_tokenizer
from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer
from trl_ext.constrained_ppo.checkpoint import critic_from_pretrained
from trl_ext.constrained_ppo.critic import _value_heads, value_heads_of
from trl_ext.equilibrium.head import EPHead
from trl_ext.equilibrium.value_heads import EPValueHeads


ASYMMETRIC = {"critic_feedback": "asymmetric", "critic_feedback_angle": 60.0}


def make_trainer(model, output, critic_model=None, peft_config=None, **settings):
    torch.manual_seed(0)
    arguments = {
        "method": "xi", "constraints": [{"reward": "low_ids", "threshold": 0.7}], "critic_head": "equilibrium",
        "critic_hidden_features": [8, 8], "critic_learning_rate": 0.02, "per_device_train_batch_size": 4,
        "max_completion_length": 6, "learning_rate": 1e-3, "max_steps": 3, "num_iterations": 2, "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 2, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "dashboard": False, **settings,
    }  # fmt: skip
    return ConstrainedPPOTrainer(
        model, [low_ids], ConstrainedPPOConfig(output_dir=str(output), **arguments), prompts(),
        processing_class=tiny_tokenizer(), critic_model=critic_model, peft_config=peft_config,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_values_start_at_zero_in_float32():
    heads = EPValueHeads(16, 3, [8])
    values = heads(torch.randn(2, 5, 16, dtype=torch.bfloat16))
    assert values.shape == (2, 5, 3) and values.dtype == torch.float32 and not values.any()
    values.sum().backward()
    assert heads.readout_weight.grad.abs().max() > 0
    assert heads.homeostasis_loss() == 0  # symmetric


def test_the_cap_is_a_setting(tmp_path):
    assert EPValueHeads(16, 2, [8, 8, 8]).cap() == pytest.approx(0.98 / 2**0.5)
    assert EPValueHeads(16, 2, 8).cap() is None
    heads = EPValueHeads(16, 2, [8, 8], spectral_cap=0.7)
    assert EPValueHeads.from_saved(heads.settings()).cap() == 0.7
    args = ConstrainedPPOConfig(
        str(tmp_path), method="ppo", critic_head="equilibrium", critic_hidden_features=16, critic_spectral_cap="0.6",
        use_cpu=True, bf16=False,
    )  # fmt: skip
    assert args.critic_spectral_cap == 0.6 and _value_heads(32, 2, args).hidden_features == [16]
    args.critic_hidden_features = [8, 8]
    assert _value_heads(32, 2, args).cap() == 0.6


@pytest.mark.parametrize("resumed", [False, True])
def test_a_critic_of_before_the_cap_was_a_setting(resumed, model, tmp_path):
    """Its file has no `spectral_cap`, which was 0.9, and a subspace for the capped weight."""
    trainer = make_trainer(model, tmp_path / "first", max_steps=1)
    with torch.no_grad():
        trainer.critic.forward_weight_1.mul_(3.0)
    trainer.save_model(str(tmp_path / "saved"))
    path = tmp_path / "saved" / "critic.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["heads"])
    assert settings.pop("spectral_cap") == "auto"
    tensors = {**load_file(path), "forward_weight_1_subspace": torch.randn(8, 8)}
    save_file(tensors, path, metadata | {"heads": json.dumps(settings)})
    if resumed:
        again = make_trainer(model, tmp_path / "again", max_steps=1)
        again.companion.load(tmp_path / "saved")
        heads = again.critic
    else:
        heads = critic_from_pretrained(str(tmp_path / "saved"))
    assert heads.cap() == 0.9 and torch.equal(heads.forward_weight_1, trainer.critic.forward_weight_1)


def test_tokens_without_a_loss_are_not_nudged(monkeypatch):
    from trl_ext.equilibrium import function

    seen = []
    original = function.error_vectors
    monkeypatch.setattr(
        function, "error_vectors",
        lambda network, constants, nudge, *rest: seen.append(len(nudge)) or original(network, constants, nudge, *rest),
    )  # fmt: skip
    heads = EPValueHeads(16, 2, [8, 8])
    torch.nn.init.normal_(heads.readout_weight)
    mask = torch.zeros(2, 5)
    mask[:, 3:] = 1
    (heads(torch.randn(2, 5, 16)) * mask.unsqueeze(-1)).square().sum().backward()
    assert seen == [4]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_it_trains_is_saved_and_resumed(critic, model, tmp_path):
    trainer = make_trainer(model, tmp_path, critic=critic)
    heads = trainer.critic if critic == "shared" else trainer.critic.heads
    assert type(heads) is EPValueHeads
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    trainer.train()
    moved = {name for name, tensor in heads.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"readout_weight", "readout_bias", "forward_weight_1", "bias_2", "input_weight"} <= moved
    assert trainer.state.log_history[0]["critic/low_ids/loss"] > 0
    trainer.save_model(str(tmp_path / "final"))
    saved = load_file(tmp_path / "final" / "critic.safetensors")
    prefix = "" if critic == "shared" else "heads."
    assert torch.equal(saved[f"{prefix}forward_weight_1"], heads.forward_weight_1)

    resumed = make_trainer(model, tmp_path / "again", critic=critic)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in trainer.critic.state_dict().items():
        assert torch.equal(resumed.critic.state_dict()[name], tensor), name


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_homeostasis_straightens_the_feedback(critic, model, tmp_path):
    settings = {"critic": critic, "max_steps": 8, "save_strategy": "no", **ASYMMETRIC}
    trainer = make_trainer(model, tmp_path / "with", critic_homeostasis_coef=10.0, **settings)
    start = value_heads_of(trainer.critic).asymmetry()["ep/weight_angle"]
    assert start == pytest.approx(60.0, abs=0.1)
    trainer.train()
    objective, angles = logged(trainer, "ep/homeostasis_loss"), logged(trainer, "ep/weight_angle")
    assert len(objective) == 8 and sorted(objective, reverse=True) == objective and objective[-1] < objective[0] / 2.5
    assert angles[0] == pytest.approx(start) and angles[-1] < 40 and sorted(angles, reverse=True) == angles
    assert logged(trainer, "ep/symmetry")[-1] > logged(trainer, "ep/symmetry")[0]
    assert logged(trainer, "ep/free_sweeps")[-1] > 0 and logged(trainer, "ep/num_unconverged")[-1] == 0

    trainer = make_trainer(model, tmp_path / "without", critic_detach=True, **settings)
    trainer.train()
    assert not logged(trainer, "ep/homeostasis_loss")
    assert value_heads_of(trainer.critic).asymmetry()["ep/weight_angle"] > 50


@pytest.mark.parametrize("accumulated", [1, 2])
def test_homeostasis_is_one_term_of_the_loss_of_an_update(accumulated, model, tmp_path):
    trainer = make_trainer(model, tmp_path, critic_homeostasis_coef=3.0, **ASYMMETRIC)
    batch = rollout(trainer)
    trainer.current_gradient_accumulation_steps = accumulated
    loss = trainer._compute_loss(trainer.model, batch)
    trainer.args.critic_homeostasis_coef = 0.0
    plain = trainer._compute_loss(trainer.model, batch)
    objective = trainer.critic.homeostasis_loss()
    assert objective > 0.05
    torch.testing.assert_close(loss - plain, 3.0 * objective / accumulated)
    (gradient,) = torch.autograd.grad(loss - plain, trainer.critic.backward_weight_1)
    (expected,) = torch.autograd.grad(3.0 * objective / accumulated, trainer.critic.backward_weight_1)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_symmetric_feedback_and_no_coefficient_are_the_default(model, tmp_path):
    trainer = make_trainer(model, tmp_path, save_strategy="no")
    same = make_trainer(
        model, tmp_path, save_strategy="no", critic_feedback="symmetric", critic_feedback_angle=0.0,
        critic_homeostasis_coef=0.0,
    )  # fmt: skip
    for each in (trainer, same):
        torch.manual_seed(1)
        each.train()
    assert not any(name.startswith("backward_weight") for name, _ in trainer.critic.named_parameters())
    names = {name for entry in trainer.state.log_history for name in entry if name.startswith("ep/")}
    assert "ep/free_sweeps" in names and not names & {"ep/homeostasis_loss", "ep/weight_angle"}
    assert logged(trainer, "loss") == logged(same, "loss")


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_saved_critic_is_rebuilt(critic, model, tmp_path):
    trainer = make_trainer(model, tmp_path, critic=critic, max_steps=1, critic_homeostasis_coef=1.0, **ASYMMETRIC)
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "| `critic_feedback_angle` | 60 |" in text and "critic_from_pretrained" in text
    loaded = critic_from_pretrained(str(tmp_path))
    assert type(loaded) is type(trainer.critic) and not loaded.training
    inputs = {"input_ids": torch.tensor([[4, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    trainer.model.eval()
    with torch.no_grad():
        states = (trainer.model.base_model(**inputs).last_hidden_state,) if critic == "shared" else inputs.values()
        expected = trainer.critic(*states)
        assert expected.abs().max() > 0
        torch.testing.assert_close(loaded(*states), expected)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_with_lora_and_accumulation(critic, model, tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"])
    settings = {
        "critic": critic, "critic_homeostasis_coef": 10.0, "gradient_accumulation_steps": 2, "steps_per_generation": 4,
        "gradient_checkpointing": True, **ASYMMETRIC,
    }  # fmt: skip
    trainer = make_trainer(model, tmp_path, peft_config=lora, **settings)
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    trainer.train()
    still = [name for name, tensor in before.items() if torch.equal(trainer.model.get_parameter(name), tensor)]
    assert not still and any("lora_" in name for name in before) and any("backward_weight" in name for name in before)
    resumed = make_trainer(model, tmp_path / "again", peft_config=lora, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "ep/homeostasis_loss") == logged(trainer, "ep/homeostasis_loss")
    for name, tensor in trainer.critic.state_dict().items():
        assert torch.equal(resumed.critic.state_dict()[name], tensor), name


def test_own_head_as_critic_takes_the_coefficient(model, tmp_path):
    own = EPHead(32, [8, 8], 2, feedback="asymmetric", feedback_angle=60.0, spectral_cap=0.9)
    settings = {"critic_homeostasis_coef": 1.0, "save_strategy": "no", **ASYMMETRIC}
    trainer = make_trainer(model, tmp_path, critic_model=own, **settings)
    trainer.train()
    objective = logged(trainer, "ep/homeostasis_loss")
    assert trainer.critic is own and objective[-1] < objective[0]
    for wrong in (torch.nn.Linear(32, 2), EPHead(32, [8, 8], 2)):
        with pytest.raises(ValueError, match="critic_homeostasis_coef=1.0.*feedback='asymmetric'"):
            make_trainer(model, tmp_path, critic_model=wrong, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critic_feedback": "tied"}, "critic_feedback.*'tied'"),
        ({"critic_feedback_angle": 30.0}, "critic_feedback_angle.*30.0.*critic_feedback='asymmetric'"),
        ({**ASYMMETRIC, "critic_feedback_angle": 200.0}, "critic_feedback_angle.*180.*200.0"),
        ({**ASYMMETRIC, "critic_feedback_angle": -1.0}, "critic_feedback_angle.*180.*-1.0"),
        ({"critic_homeostasis_coef": 1.0}, "critic_homeostasis_coef=1.0.*critic_feedback='asymmetric'"),
        ({**ASYMMETRIC, "critic_homeostasis_coef": -0.5}, "critic_homeostasis_coef.*-0.5"),
        ({**ASYMMETRIC, "critic_homeostasis_coef": float("nan")}, "critic_homeostasis_coef.*nan"),
        ({"critic_head": "linear", "critic_feedback": "asymmetric"}, "critic_feedback='asymmetric'.*critic_head="),
        ({"critic_head": "linear", "critic_feedback_angle": 9.0}, "critic_feedback_angle=9.0.*critic_head="),
        ({"critic_head": "linear", "critic_homeostasis_coef": 1.0}, "critic_homeostasis_coef=1.0.*critic_head="),
        ({"critic_head": "quadratic"}, "critic_head.*quadratic"),
        ({"critic_hidden_features": [8, 0]}, r"critic_hidden_features.*\[8, 0\]"),
        ({"critic_hidden_features": []}, r"critic_hidden_features.*\[\]"),
    ],
)
def test_wrong_settings(settings, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(model, tmp_path, **settings)
