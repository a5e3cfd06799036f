import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from tests.helpers.constrained_ppo import XI, length, low_ids, make, prompts, rollout
from tests.helpers.tiny import tiny_model
from trl_ext.constrained_ppo.advantages import gae, mix_advantages, whiten
from trl_ext.constrained_ppo.constrained_ppo_trainer import ConstrainedPPOTrainer
from trl_ext.constrained_ppo.critic import clipped_value_loss


@pytest.mark.parametrize(
    "settings",
    [
        {},
        XI,
        {"method": "mu", "constraints": [{"reward": "low_ids", "threshold": 0.7}]},
        {"method": "all", "constraints": [{"reward": "low_ids", "threshold": 0.7}]},
        {"num_iterations": 2, "steps_per_generation": 2},
        {"num_generations": 2},
        {"gradient_checkpointing": True},
        {"kl_coef": 0.0},
    ],
    ids=["ppo", "xi", "mu", "all", "epochs", "groups", "checkpointing", "no-kl"],
)
def test_trains(settings, tmp_path, path):
    trainer = make(tmp_path, path, max_steps=3, **{**{}, **settings})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    unchanged = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    assert not unchanged
    logged = trainer.state.log_history[0]
    assert logged["rewards/low_ids/mean"] > 0 and "critic/kl/loss" in logged and "critic/length/value" in logged
    assert ("kl/per_token" in logged) == (settings.get("kl_coef") != 0.0)
    assert ("weight/objective" in logged) == ("constraints" in settings)


def test_reward_rises(tmp_path, path):
    trainer = make(tmp_path, path, rewards=[low_ids], max_steps=40, per_device_train_batch_size=32, learning_rate=3e-3,
                   kl_coef=0.01, num_iterations=2)  # fmt: skip
    trainer.train()
    means = [entry["rewards/low_ids/mean"] for entry in trainer.state.log_history if "rewards/low_ids/mean" in entry]
    assert sum(means[-5:]) / 5 > means[0] + 0.2


@pytest.mark.parametrize("settings", [{}, XI, {**XI, "method": "xi-paper"}], ids=["ppo", "xi", "xi-paper"])
def test_rollout_and_loss_equal_the_formulas(settings, tmp_path, path):
    trainer = make(tmp_path, path, **settings)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in trainer.critic.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in trainer.model.named_parameters():
            if "value_heads" not in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    batch = rollout(trainer)
    mask = batch["completion_mask"]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], mask], dim=1)
    start = batch["prompt_ids"].size(1) - 1
    models = {"policy": trainer.model, "reference": trainer.ref_model}
    log_probs, hidden = {}, {}
    for name, model in models.items():
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=attention, output_hidden_states=True)
        logits = output.logits[:, start:-1].log_softmax(-1)
        log_probs[name] = logits.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
        hidden[name] = output.hidden_states[-1][:, start:-1]
    values = hidden["policy"] @ trainer.critic.weight.t() + trainer.critic.bias
    torch.testing.assert_close(
        batch["old_state_values"] * mask.unsqueeze(-1), values * mask.unsqueeze(-1), rtol=1e-4, atol=1e-5
    )

    completion_ids = [row[keep.bool()].tolist() for row, keep in zip(batch["completion_ids"], mask, strict=True)]
    streams = torch.zeros(3, *mask.shape)
    for stream, reward in enumerate((low_ids, length)):
        for row, value in enumerate(reward(completion_ids=completion_ids)):
            streams[stream, row, len(completion_ids[row]) - 1] = value
    streams[2] = -0.2 * (log_probs["policy"] - log_probs["reference"]) * mask
    estimates = [gae(s, v, mask, 0.99, 0.95) for s, v in zip(streams, values.detach().unbind(-1), strict=True)]
    a_low, a_length, a_kl = (advantage for advantage, _ in estimates)
    if settings:
        weights = trainer.multipliers.weights().float()
        expected = mix_advantages(a_kl, torch.stack([a_low, a_length]), weights, mask)
        if settings["method"] == "xi":
            spreads = trainer.rollout.rewards.std(dim=0, unbiased=False)
            spreads = spreads.where(spreads > 1e-6, 1.0)  # a constant is not scaled
            summed = a_kl + weights[0] * a_low / spreads[0] + weights[1] * a_length / spreads[1]
            expected = summed / (1 + weights.abs().sum())
    else:
        expected = whiten(a_low + a_length + a_kl, mask)
    torch.testing.assert_close(batch["advantages"], expected, rtol=1e-3, atol=1e-4)

    batch["num_items_in_batch"] = mask.sum().float()
    loss = trainer._compute_loss(trainer.model, batch)
    returns = torch.stack([r for _, r in estimates], dim=-1)
    value_loss = (0.5 * (values - returns).square() * mask.unsqueeze(-1)).sum((0, 1)) / mask.sum()
    policy_loss = -(expected * mask).sum() / mask.sum()
    coefficients = torch.tensor([0.5, 0.5, 0.2])
    torch.testing.assert_close(loss, policy_loss + (coefficients * value_loss).sum(), rtol=1e-3, atol=1e-4)


def test_clipped_value_loss_by_hand():
    values, old, returns = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 0.4, 0.0])
    # clipped to 0.2: errors max(0.25, 0.64), max(0.01, 0.04), 0
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 0.2), torch.tensor([0.32, 0.02, 0.0]))
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 0.0), torch.tensor([0.125, 0.005, 0.0]))


def test_saved_policy_is_plain_and_the_critic_lies_beside(tmp_path, path):
    trainer = make(tmp_path, path, **XI)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    critic = load_file(tmp_path / "saved" / "critic.safetensors")
    assert torch.equal(critic["weight"], trainer.critic.weight) and critic["weight"].shape == (3, 32)
    state = json.loads((tmp_path / "saved" / "multipliers.json").read_text())
    assert state == json.loads(json.dumps(trainer.multipliers.state_dict())) and state["num_updates"] == 2


def test_own_critic_and_detached_backbone(tmp_path, path):
    critic = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    trainer = make(tmp_path, path, critic_detach=True, trainer_arguments={"critic_model": critic})
    batch = rollout(trainer)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    trainer._compute_loss(trainer.model, batch).backward()
    assert critic[0].weight.grad.abs().sum() > 0
    assert all(
        p.grad is None or torch.count_nonzero(p.grad) == 0
        for name, p in trainer.model.named_parameters()
        if "value_heads" not in name
    )


def test_only_policy_weights_go_to_vllm(tmp_path, path):
    from contextlib import nullcontext
    from types import SimpleNamespace

    from trl.generation.vllm_generation import VLLMGeneration

    from trl_ext._upstream import keep_from_vllm

    class FakeClient:
        def update_named_params(self, metadata, parameters):
            self.received = dict(parameters)

    trainer = make(tmp_path, path)
    generation = VLLMGeneration.__new__(VLLMGeneration)
    generation.model = trainer.model
    generation._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())
    keep_from_vllm(generation, "value_heads.")
    client = FakeClient()
    client.update_named_params(None, generation._iter_named_params())
    plain = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    assert client.received.keys() == plain.keys()


def test_evaluation_leaves_the_multipliers(tmp_path, path):
    trainer = make(tmp_path, path, **XI, trainer_arguments={"eval_dataset": prompts(8)})
    before = trainer.multipliers.state_dict()
    metrics = trainer.evaluate()
    assert trainer.multipliers.state_dict() == before
    assert metrics["eval_rewards/low_ids/mean"] > 0 and "eval_critic/kl/loss" in metrics


async def later(completion_ids, **columns):
    return low_ids(completion_ids)


def test_async_rewards_and_conversations(tmp_path, path):
    trainer = make(tmp_path, path, rewards=[later])
    trainer.train_dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "the film was"}]} for _ in range(16)]
    )
    trainer.train()
    assert trainer.state.log_history[0]["rewards/later/mean"] > 0


def constant_none(completion_ids, **columns):
    return [None for _ in completion_ids]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ppo", "constraints": [{"reward": 0, "threshold": 1.0}]}, "takes no `constraints`"),
        ({"method": None}, "`constraints` is empty"),
        ({"method": "xi", "constraints": [{"reward": "low", "threshold": 1.0}]}, "'low' names no reward.*low_ids"),
        ({"method": "xi", "constraints": [{"reward": 2, "threshold": 1.0}]}, "2 names no reward"),
        ({"method": "xi", "constraints": [{"reward": 0, "treshold": 1.0}]}, "threshold.*treshold"),
        (
            {"method": None, "constraints": [
                {"reward": 0, "threshold": 1.0, "kind": ">="}, {"reward": 0, "threshold": 0.5, "kind": "<="}]},
            "contradict",
        ),
        ({"beta": 0.1}, "`beta=0.1`.*kl_coef"),
        ({"loss_type": "sapo"}, "'sapo'.*dapo"),
        ({"vf_coef": -1.0}, "`vf_coef`.*-1"),
        ({"sync_ref_model": True}, "sync_ref_model"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_wrong_settings(settings, message, tmp_path, path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, path, **settings)


def test_wrong_arguments(tmp_path, path):
    grpo = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="ConstrainedPPOConfig.*GRPOConfig"):
        ConstrainedPPOTrainer(path, reward_funcs=[low_ids], args=grpo, train_dataset=prompts())
    with pytest.raises(ValueError, match=r"\(1, 2, 4\); it must give \(1, 2, 3\)"):
        make(tmp_path, path, trainer_arguments={"critic_model": torch.nn.Linear(32, 4)})
    with pytest.raises(ValueError, match="constant_none.*None, NaN"):
        make(tmp_path, path, rewards=[constant_none]).train()
    tiny_model().save_pretrained(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(
        json.dumps({"global_step": 1, "log_history": [], "train_batch_size": 8})
    )
    with pytest.raises(ValueError, match="critic.safetensors"):
        make(tmp_path, path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
