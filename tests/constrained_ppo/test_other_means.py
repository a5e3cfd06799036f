"""Constrained PPO and GRPO by other means: adapters, 4 bits, checkpointing, bf16, a compiler, vLLM."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from trl.generation.vllm_generation import VLLMGeneration

from tests.helpers import constrained_grpo, constrained_ppo
from tests.helpers.compiling import compiled_training, slow_to_compile
from tests.helpers.constrained_ppo import XI, assert_same, fixed_completions
from tests.helpers.tiny import qlora_arguments, save_tiny_model
from tests.helpers.vllm import FakeServer
from trl_ext.optim import AdamP
from trl_ext.optim.callbacks import bottom_optimizer


pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

PPO, GRPO = "shared critic", "no critic"
# Two updates on each rollout, under constraints that both act
SETTINGS = {
    PPO: {**XI, "num_iterations": 2, "max_steps": 3},
    GRPO: {**constrained_grpo.BOUNDS, "beta": 0.1, "num_iterations": 2, "max_steps": 3},
}


def make(kind, folder, path, samples=False, trainer_arguments=None, **settings):
    """A trainer whose completions are the same in every run, or, with `samples`, its model's."""
    rollouts = {} if samples else {"rollout_func": fixed_completions}
    make_trainer = {PPO: constrained_ppo, GRPO: constrained_grpo}[kind].make
    arguments = {**rollouts, **(trainer_arguments or {})}
    return make_trainer(folder, path, trainer_arguments=arguments, **{**SETTINGS[kind], **settings})


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.fixture(scope="module")
def plain(path, tmp_path_factory):
    """Each kind, trained without any of it."""
    trainers = {kind: make(kind, tmp_path_factory.mktemp("plain"), path) for kind in (PPO, GRPO)}
    for trainer in trainers.values():
        trainer.train()
        assert len(logged(trainer, "loss")) == 3
    return trainers


@pytest.mark.parametrize("kind", [PPO, GRPO])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-5),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, 1e-5),
        pytest.param({"torch_compile": True}, 1e-4, marks=slow_to_compile),
        ({"bf16": True}, 3e-2),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, 3e-2),
    ],
    ids=["checkpointing", "reentrant", "compiled", "bf16", "bf16-weights"],
)
def test_same_training_by_other_means(settings, tolerance, kind, plain, tmp_path, path):
    settings = dict(settings)
    compiles = settings.pop("torch_compile", False)
    with compiled_training() if compiles else nullcontext({}) as compiling:
        trainer = make(kind, tmp_path, path, **settings, **compiling)
        trainer.train()
    for key in ("loss", "kl/per_token", "grad_norm", "weight/low_ids", "rewards/low_ids/mean"):
        expected = logged(plain[kind], key)
        assert expected and logged(trainer, key) == pytest.approx(expected, abs=tolerance, rel=10 * tolerance), key
    if trainer.critic is not None:  # The critic is float32 in every policy
        assert {parameter.dtype for parameter in trainer.critic.parameters()} == {torch.float32}
        for found, wanted in zip(trainer.critic.parameters(), plain[kind].critic.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=max(2e-3, tolerance))
    for found, wanted in zip(trainer.model.parameters(), plain[kind].model.parameters(), strict=True):
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=max(2e-3, tolerance))


def test_without_a_critic_and_with_lora(tmp_path, path):
    """Nothing but the adapter moves, away from the policy with the adapter off; resumed within a rollout."""

    def trained(folder, resume=None):
        arguments = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"])}
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
        trainer = make(GRPO, tmp_path / folder, path, samples=True, trainer_arguments=arguments, **settings)
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train(resume_from_checkpoint=resume)
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, before[name]) != ("lora_" in name), name
        return trainer

    whole = trained("whole")
    first, second = logged(whole, "kl/per_token")
    assert first == 0.0 != second and whole.ref_model is None
    assert_same(whole, trained("resumed", str(tmp_path / "whole" / "checkpoint-3")))


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_qlora(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    path = save_tiny_model(tmp_path / "model", hidden_size=64)
    trainer = make(
        kind, tmp_path, path, bf16=True, trainer_arguments=qlora_arguments(), samples=True, learning_rate=1e-2
    )
    assert trainer.model.is_loaded_in_4bit
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "value_heads" in name for name in trainable) and len(trainable) >= 8
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trainable
    # The reference is the policy with its adapter off: the same four bits
    first, second = logged(trainer, "kl/per_token")
    assert first == 0.0 != second
    if kind == PPO:
        assert {parameter.dtype for parameter in trainer.critic.parameters()} == {torch.float32}


@pytest.mark.parametrize(("kind", "adapter"), [(PPO, False), (GRPO, False), (GRPO, True)])
def test_vllm_samples_from_the_policys_weights(kind, adapter, tmp_path, path, monkeypatch):
    """The engine is a stand-in with the policy's weights alone, and what it drew is as likely under the policy."""

    def start(generation):
        generation.vllm_client = FakeServer(path)

    monkeypatch.setattr(VLLMGeneration, "_init_vllm", start)
    arguments = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"])} if adapter else None
    trainer = make(
        kind, tmp_path, path, samples=True, trainer_arguments=arguments, use_vllm=True, vllm_mode="server",
        learning_rate=1e-2, max_steps=4, optim="adamp",
    )  # fmt: skip
    trainer.train()
    assert type(bottom_optimizer(trainer.optimizer)) is AdamP
    server = trainer.vllm_generation.vllm_client
    assert server.num_updates == 2  # once for each rollout
    assert logged(trainer, "sampling/sampling_logp_difference/max") == pytest.approx([0.0, 0.0], abs=1e-4)
    assert logged(trainer, "sampling/importance_sampling_ratio/mean") == pytest.approx([1.0, 1.0], abs=1e-4)
    assert logged(trainer, "rewards/low_ids/mean")[0] > 0
    # The weights that it sampled the second rollout from are not those that training started from
    start_weights = FakeServer(path).model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert not torch.equal(server.model.get_parameter("model.layers.0.self_attn.q_proj.weight"), start_weights)
