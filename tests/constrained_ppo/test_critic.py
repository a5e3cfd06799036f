import textwrap

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.helpers.constrained_ppo import XI, make, rollout
from tests.helpers.launching import launch, rank_environments
from tests.helpers.tiny import save_tiny_model, tiny_model
from trl_ext.constrained_ppo.critic import CriticCompanion, SeparateCritic, ValueHeads
from trl_ext.core.recorder import extend_forward


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, path):
    folder = tmp_path_factory.mktemp("reward_model")
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("source", ["policy", "reward model", "module"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_separate_critic_trains_and_leaves_the_policy_alone(source, checkpointing, tmp_path, path, reward_model):
    settings = {"critic": "separate", "gradient_checkpointing": checkpointing}
    arguments = {}
    if source == "reward model":
        settings["critic_model_name_or_path"] = reward_model
    if source == "module":
        arguments["critic_model"] = tiny_model("qwen2", seed=3)
    trainer = make(tmp_path, path, trainer_arguments=arguments, **{**XI, **settings})
    assert isinstance(trainer.critic, SeparateCritic)
    start = {name: p.detach().clone() for name, p in trainer.critic.named_parameters()}
    embedding = start["backbone.embed_tokens.weight"]
    expected = {
        "policy": AutoModelForCausalLM.from_pretrained(path).model.embed_tokens.weight,
        "reward model": AutoModelForSequenceClassification.from_pretrained(reward_model).model.embed_tokens.weight,
        "module": tiny_model("qwen2", seed=3).model.embed_tokens.weight,
    }[source]
    assert torch.equal(embedding, expected)

    batch = rollout(trainer)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    trainer._compute_loss(trainer.model, batch).backward()
    own = {name for name, p in trainer.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert own and all(name.startswith("value_heads.") for name in own)
    trainer.model.zero_grad()

    trainer.train()
    unmoved = [name for name, p in trainer.critic.named_parameters() if torch.equal(p, start[name])]
    assert not unmoved
    trainer.save_model(str(tmp_path / "saved"))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    saved = load_file(tmp_path / "saved" / "critic.safetensors")
    assert saved.keys() == start.keys()
    groups = trainer.optimizer.param_groups
    assert len(groups[-1]["params"]) == len(start) and groups[-1]["initial_lr"] == 1e-2


def test_values_of_a_separate_critic(path):
    policy = AutoModelForCausalLM.from_pretrained(path)
    critic = SeparateCritic(tiny_model(seed=5).model, 3)
    with torch.no_grad():
        critic.heads.weight.normal_()
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(policy)
    policy.add_module("value_heads", critic)
    extend_forward(policy, CriticCompanion(policy, critic, ["a", "b"]).forward)
    ids = torch.tensor([[0, 5, 6, 7, 8], [4, 9, 3, 2, 1]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    output = policy(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True, with_values=True)
    hidden = critic.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(output.state_values, critic.heads(hidden)[:, :-1])
    plain = policy(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
    assert not hasattr(plain, "state_values") and torch.equal(plain.log_probs, output.log_probs)
    assert policy(input_ids=ids, attention_mask=mask).logits.shape == (2, 5, 36)


def test_heads_of_streams_are_not_mixed_up():
    """The official critic gives every constraint the value of the KL head."""
    heads = ValueHeads(4, 3)
    with torch.no_grad():
        heads.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert heads(torch.zeros(1, 2, 4))[0, 0].tolist() == [1.0, 2.0, 3.0]


def test_each_stream_uses_its_own_head(tmp_path, path):
    trainer = make(tmp_path, path, **XI)
    with torch.no_grad():
        trainer.critic.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    batch = rollout(trainer)
    mask = batch["completion_mask"].bool()
    assert torch.allclose(batch["old_state_values"][mask], torch.tensor([1.0, 2.0, 3.0]))
    last = mask.sum(dim=1) - 1
    row = int(last.argmax())
    rewards = trainer.rollout.rewards[row]
    # At the last token the return is the reward itself, whatever the value
    torch.testing.assert_close(batch["state_returns"][row, last[row], :2], rewards)


@pytest.mark.parametrize(
    ("settings", "critic_model", "message"),
    [
        ({}, torch.nn.Linear(32, 4), r"\(1, 2, 4\); it must give \(1, 2, 3\)"),
        ({}, torch.nn.Linear(16, 3), "width 32"),
        ({}, "some/model", "Set `critic='separate'`"),
        ({"critic": "separate"}, torch.nn.Linear(32, 3), "got `Linear`.*critic='shared'"),
        ({"critic": "separate"}, "small", "vocabulary of 20 tokens and the policy one of 36"),
    ],
)
def test_critics_that_do_not_fit(settings, critic_model, message, tmp_path, path):
    if critic_model == "small":
        critic_model = save_tiny_model(tmp_path / "small", vocab_size=20)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, path, trainer_arguments={"critic_model": critic_model}, **settings)


class Straightening(torch.nn.Linear):
    """No head of ours, with all that value heads may offer beside their values."""

    feedback = "asymmetric"

    def homeostasis_loss(self):
        return self.weight.square().sum()

    def metrics(self):
        return {"own/num_forwards": 7.0}

    def asymmetry(self):
        return {"own/size": float(self.weight.abs().max())}


def test_any_heads_that_offer_an_objective_and_metrics_are_asked(tmp_path, path):
    critic = Straightening(32, 3)
    size = critic.asymmetry()["own/size"]
    settings = {"critic_head": "equilibrium", "critic_feedback": "asymmetric", "critic_homeostasis_coef": 5.0}
    trainer = make(tmp_path, path, max_steps=3, trainer_arguments={"critic_model": critic}, **settings)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "own/size" in entry]
    assert len(entries) == 3 and entries[0]["own/size"] == pytest.approx(size) and entries[0]["own/num_forwards"] == 7
    objective = [entry["ep/homeostasis_loss"] for entry in entries]
    assert objective == sorted(objective, reverse=True) and objective[-1] < objective[0]


SHARDED = """
    import collections, itertools, torch, torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from trl.trainer.utils import add_fused_lm_head
    from tests.helpers.tiny import tiny_model
    from trl_ext._upstream import gathered_state_dict
    from trl_ext.constrained_ppo import critic as critics
    from trl_ext.constrained_ppo.critic import SeparateCritic, ValueHeads, value_heads_of
    from trl_ext.core.recorder import extend_forward
    from trl_ext.equilibrium.value_heads import EPValueHeads

    def policy(separate, equilibrium):
        model = tiny_model("qwen3")
        torch.manual_seed(1)
        heads = EPValueHeads(32, 3, [8, 8], "asymmetric", 60.0) if equilibrium else ValueHeads(32, 3)
        with torch.no_grad():
            (heads.readout_weight if equilibrium else heads.weight).normal_(std=0.1)
        critic = SeparateCritic(tiny_model("llama", seed=2).model, 3, heads) if separate else heads
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        model.add_module("value_heads", critic)
        extend_forward(model, critics.CriticCompanion(model, critic, ["a", "b"], homeostasis=equilibrium).forward)
        return model.train()

    def loss_of(model, rows):
        ids = torch.arange(24).view(4, 6)[rows] + 3
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True,
                       with_values=True)
        homeostasis_loss = 0.0 if output.homeostasis_loss is None else output.homeostasis_loss.mean()
        return output.log_probs.mean() + output.state_values.square().mean() + 10.0 * homeostasis_loss

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for separate, equilibrium in itertools.product((False, True), repeat=2):
        whole, sharded = policy(separate, equilibrium), policy(separate, equilibrium)
        layers = [*sharded.model.layers, *(sharded.value_heads.backbone.layers if separate else [])]
        for module in [*layers, sharded]:
            fully_shard(module)
        full, part = loss_of(whole, slice(0, 4)), loss_of(sharded, slice(2 * rank, 2 * rank + 2))
        mean = part.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / 2, full.detach())
        full.backward(), part.backward()
        for (name, p), q in zip(whole.named_parameters(), sharded.parameters(), strict=True):
            assert type(q.grad).__name__ == "DTensor", name
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-4, atol=1e-6, msg=name)
        saved = gathered_state_dict(sharded.value_heads)
        for name, p in whole.value_heads.named_parameters():
            torch.testing.assert_close(saved[name], p.detach())
        if equilibrium:
            heads = value_heads_of(whole.value_heads)
            metrics = collections.defaultdict(list)
            critics.record_heads(metrics, value_heads_of(sharded.value_heads))
            assert metrics["ep/weight_angle"] == [heads.asymmetry()["ep/weight_angle"]], metrics
    dist.barrier()
    print("rank", rank, "agrees", flush=True)
    dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_fsdp2_over_two_processes(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(textwrap.dedent(SHARDED))
    assert launch([script], rank_environments(2)).count("agrees") == 2
