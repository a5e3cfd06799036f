"""The equilibrium head as critic of constrained PPO."""

import pytest
import torch
from safetensors.torch import load_file

from tests.constrained_ppo.test_constrained_ppo_trainer import low_ids, prompts
from tests.tiny import save_tiny_model, tiny_tokenizer
from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer
from trl_ext.equilibrium.value_heads import EPValueHeads


def make_trainer(model, output, **settings):
    torch.manual_seed(0)
    arguments = {
        "method": "xi", "constraints": [{"reward": "low_ids", "threshold": 0.7}], "critic_head": "equilibrium",
        "critic_hidden_features": [8, 8], "critic_learning_rate": 0.02, "per_device_train_batch_size": 4,
        "max_completion_length": 6, "learning_rate": 1e-3, "max_steps": 3, "num_iterations": 2, "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 2, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, **settings,
    }  # fmt: skip
    return ConstrainedPPOTrainer(
        model, [low_ids], ConstrainedPPOConfig(output_dir=str(output), **arguments), prompts(),
        processing_class=tiny_tokenizer(),
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


def test_tokens_without_a_loss_are_not_nudged(monkeypatch):
    from trl_ext.equilibrium import equilibrium_function

    seen = []
    original = equilibrium_function.error_vectors
    monkeypatch.setattr(
        equilibrium_function, "error_vectors",
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critic_head": "quadratic"}, "critic_head.*quadratic"),
        ({"critic_hidden_features": [8, 0]}, r"critic_hidden_features.*\[8, 0\]"),
        ({"critic_hidden_features": []}, r"critic_hidden_features.*\[\]"),
    ],
)
def test_wrong_settings(settings, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(model, tmp_path, **settings)
