"""What a user of another trainer gets wrong without noticing: stop tokens, references, dropout, copies of adapters."""

import copy
import json
import logging

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, TrainerState

from tests.helpers.constrained_ppo import low_ids, make, prompts, rollout
from tests.helpers.tiny import tiny_model
from trl_ext import ConstrainedPPOConfig, critic_from_pretrained
from trl_ext.constrained_ppo.critic import build_critic, clipped_value_loss
from trl_ext.constrained_ppo.gold import gold_dataset
from trl_ext.constrained_ppo.prompts import random_rows, stream_position
from trl_ext.constrained_ppo.reference import frozen_copy
from trl_ext.constrained_ppo.scores import ScoreScaling, value_clipranges
from trl_ext.constrained_ppo.stop_tokens import stop_token_ids
from trl_ext.core.dropout import disable_dropout, stated_probabilities


STOP = 7


def perturbed(model, size=0.1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def likely(model, token, times=6.0):
    with torch.no_grad():
        model.lm_head.weight[token] *= times
    return model


# Stop tokens


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, path):
    """A trainer whose responses end at token 7, and one rollout of it."""
    trainer = make(
        tmp_path_factory.mktemp("stopped"), likely(AutoModelForCausalLM.from_pretrained(path), STOP, 4.0),
        generation_kwargs={"eos_token_id": STOP}, missing_eos_penalty=2.0, per_device_train_batch_size=32,
    )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer, trainer._generate_and_score_completions(list(prompts(32)))


def test_nothing_after_a_stop_token_of_the_users_counts(stopped):
    trainer, batch = stopped
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    ended = ((ids == STOP) & mask).any(dim=1)
    assert 4 < ended.sum() < 32
    for row, keep in zip(ids, mask, strict=True):
        kept = row[keep].tolist()
        assert STOP not in kept[:-1] and (kept[-1] == STOP or len(kept) == 8)
    # The tokenizer's own end-of-sequence token, id 1, is a token like others
    assert ((ids == 1) & mask).any()
    outside = ~mask
    assert outside.any()
    for name in ("divergence", "mask"):
        assert not trainer.rollout.__dict__[name][outside].any()
    for name in ("advantages", "returns"):
        assert not trainer.rollout.__dict__[name][:, outside].any()
    assert not batch["advantages"][outside].any() and batch["num_items_in_batch"] == mask.sum()


def test_rewards_penalty_and_statistics_see_the_users_stop_token(stopped):
    trainer, batch = stopped
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    lengths, ended = mask.sum(dim=1), ((ids == STOP) & mask).any(dim=1)
    torch.testing.assert_close(trainer.rollout.rewards[:, 1], lengths / 8)
    trained = trainer._trained_rewards(trainer.rollout, batch)
    torch.testing.assert_close(trainer.rollout.rewards - trained, 2.0 * (~ended).float().unsqueeze(1).expand(-1, 2))
    (clipped,) = trainer._metrics["train"]["completions/clipped_ratio"]
    # TRL also takes a response that ends in a sampled padding token as finished
    cut = [row[keep][-1] not in (STOP, 0) for row, keep in zip(ids, mask, strict=True)]
    assert clipped == pytest.approx(sum(cut) / 32)


@pytest.mark.parametrize(
    ("generation_kwargs", "found"),
    [
        (None, [1, 5]),
        ({"top_k": 3}, [1, 5]),
        ({"eos_token_id": 42}, [42]),
        ({"eos_token_id": [42, 1]}, [42, 1]),
        ({"stop_token_ids": [42, 5]}, [1, 5, 42]),
        ({"stop_token_ids": [42], "ignore_eos": True}, [42]),
    ],
)
def test_stop_token_ids(generation_kwargs, found):
    assert stop_token_ids(generation_kwargs, [1, 5]) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_kwargs": {"eos_token_id": "<eos>"}}, "'<eos>'.*convert_tokens_to_ids"),
        ({"generation_kwargs": {"eos_token_id": []}}, "must be a token id or a list"),
        ({"generation_kwargs": {"stop_token_ids": [4]}}, "not known to transformers.*'eos_token_id': \\[4\\]"),
        ({"generation_kwargs": {"eos_token_id": 4}, "use_vllm": True}, "not known to vLLM.*'stop_token_ids': 4"),
        ({"use_score_norm": True}, "`use_score_norm=True` needs `use_score_scaling=True`"),
        ({"score_clip": 0.0}, "`score_clip`.*0.0"),
        ({"cliprange_value_unit": "returns"}, "`cliprange_value_unit`.*'spread'.*'returns'"),
        ({"critic_max_grad_norm": 1.0, "max_grad_norm": 0.0}, "`critic_max_grad_norm=1.0`.*`max_grad_norm=0.0`"),
    ],
)
def test_wrong_settings(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ConstrainedPPOConfig(str(tmp_path), method="ppo", use_cpu=True, bf16=False, **settings)


# The reference


def kl_at_start(trainer):
    rollout(trainer)
    return trainer._metrics["train"]["kl/per_response"][-1]


def test_a_model_trained_in_memory_starts_at_its_reference(tmp_path, path):
    model = perturbed(AutoModelForCausalLM.from_pretrained(path))
    trainer = make(tmp_path, model)
    assert abs(kl_at_start(trainer)) < 1e-4
    assert trainer.ref_model is not trainer.model and not trainer.ref_model.training
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())
    before = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.ref_model.state_dict().items())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), trainer.ref_model.parameters(), strict=False))


def test_a_model_by_name_or_without_one_and_with_an_adapter(tmp_path, path):
    assert abs(kl_at_start(make(tmp_path, path))) < 1e-4
    model = tiny_model()
    assert not model.config._name_or_path
    assert abs(kl_at_start(make(tmp_path, model))) < 1e-4
    changed = perturbed(AutoModelForCausalLM.from_pretrained(path))
    trainer = make(tmp_path, changed, trainer_arguments={"peft_config": LoraConfig(target_modules=["q_proj"])})
    assert trainer.ref_model is None and abs(kl_at_start(trainer)) < 1e-4


@pytest.mark.parametrize("kind", ["path", "model"])
def test_reference_of_the_users(kind, tmp_path, path):
    model = perturbed(AutoModelForCausalLM.from_pretrained(path))
    reference = path if kind == "path" else AutoModelForCausalLM.from_pretrained(path)
    trainer = make(tmp_path, model, trainer_arguments={"ref_model": reference})
    plain = AutoModelForCausalLM.from_pretrained(path)
    for name, parameter in plain.named_parameters():
        assert torch.equal(trainer.ref_model.get_parameter(name), parameter)
    assert kl_at_start(trainer) > 0.1


def test_a_copy_is_no_view_of_a_model_that_trainers_have_widened(tmp_path, path):
    """TRL's fused head and ours are closures over the model that they were put into."""
    first = make(tmp_path, path)
    model = first.model
    copied = frozen_copy(model)
    assert not hasattr(copied, "value_heads")
    ids = torch.tensor([[4, 9, 3, 2, 1]])
    with torch.no_grad():
        before = copied(input_ids=ids).logits
        perturbed(model, 1.0)
        assert torch.equal(copied(input_ids=ids).logits, before)
    # A second trainer on the model that a first one has trained
    assert abs(kl_at_start(make(tmp_path, model))) < 1e-4


def test_references_that_do_not_fit(tmp_path, path):
    model = AutoModelForCausalLM.from_pretrained(path)
    lora = LoraConfig(target_modules=["q_proj"])
    for arguments, settings, error, message in (
        ({"ref_model": 3}, {}, TypeError, "`ref_model` must be a model.*got `int`"),
        ({"ref_model": path, "peft_config": lora}, {}, ValueError, "adapter off. Leave `ref_model` out"),
        ({"peft_config": LoraConfig(bias="all")}, {}, ValueError, "`bias='all'`.*would move.*bias='none'"),
        ({"ref_model": path}, {"kl_coef": 0.0}, ValueError, "`kl_coef=0` computes no divergence"),
        ({"ref_model": tiny_model(vocab_size=20)}, {}, ValueError, "vocabulary of 20 tokens and the policy one of 36"),
    ):
        with pytest.raises(error, match=message):
            make(tmp_path, model, trainer_arguments=arguments, **settings)


def test_divergences_and_rewards_that_cannot_be_are_named_once(tmp_path, path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trl_ext"), "propagate", True)
    trainer = make(tmp_path, path)
    noise = torch.linspace(-1, 1, 64).view(64, 1)
    trainer.rollout.mask = torch.ones(64, 1)

    def warnings(divergence, step=0, rewards=(0.7, 3.0)):
        trainer.rollout.divergence, trainer.rollout.rewards = divergence, torch.tensor([rewards] * 64)
        trainer.state.global_step = step
        caplog.clear()
        trainer._check_rollout(trainer.rollout)
        return caplog.text

    assert warnings(noise) == warnings(noise + 3, step=1) == warnings(torch.full((64, 1), -1e-6)) == ""
    text = warnings(noise, rewards=(0.7, -300.0))
    assert "'length' (300)" in text and "1500 rollouts" in text and "low_ids" not in text
    assert "2.9" in warnings(noise + 2.9) and warnings(noise - 1.8, step=1, rewards=(0.7, 300.0)) == ""
    trainer._warned.clear()
    assert "never negative" in warnings(noise - 1.8, step=1)
    trainer._warned.clear()
    trainer.args.cliprange_value_unit = "spread"
    assert "before the first step" in warnings(noise + 3, rewards=(0.7, -300.0)) and "large" not in caplog.text
    trainer._warned.clear()
    trainer._has_own_reference = True
    assert warnings(noise + 3) == ""


# Adapters and a separate critic


def test_critic_of_a_policy_with_an_adapter_is_plain_and_comes_back_as_it_was(tmp_path, path):
    config = LoraConfig(target_modules=["q_proj"])
    trainer = make(tmp_path, path, critic="separate", max_steps=1, trainer_arguments={"peft_config": config})
    plain = AutoModelForCausalLM.from_pretrained(path).model
    assert trainer.critic.backbone.state_dict().keys() == plain.state_dict().keys()
    for name, parameter in plain.named_parameters():
        assert torch.equal(trainer.critic.backbone.get_parameter(name), parameter)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    adapter = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert adapter and not [name for name in adapter if "value_heads" in name]
    ids = torch.tensor([[4, 9, 3, 2, 1], [5, 5, 8, 1, 0]])
    mask = (ids > 0).long()
    with torch.no_grad():
        assert trainer.critic.heads.weight.any()
        values = trainer.critic.eval()(ids, mask)
        assert torch.equal(critic_from_pretrained(str(tmp_path / "saved"))(ids, mask), values)
    file = tmp_path / "saved" / "critic.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file({name: t for name, t in load_file(file).items() if "layers.1" not in name}, file, metadata=metadata)
    with pytest.raises(ValueError, match=r"does not fit.*lacks \['backbone.layers.1"):
        critic_from_pretrained(str(tmp_path / "saved"))


def test_biases_of_shared_heads_stay_out_of_the_adapter(tmp_path, path):
    config = LoraConfig(target_modules=["q_proj"], bias="all")
    trainer = make(tmp_path, path, kl_coef=0.0, trainer_arguments={"peft_config": config})
    trainer.save_model(str(tmp_path / "saved"))
    adapter = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert adapter and not [name for name in adapter if "value_heads" in name]


def test_a_trained_adapter_is_merged_into_the_copy(tmp_path, path):
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(path), LoraConfig(target_modules=["q_proj"]))
    perturbed(policy)
    args = ConstrainedPPOConfig(str(tmp_path), method="ppo", use_cpu=True, bf16=False, critic="separate")
    critic = build_critic(policy, 3, args)
    ids = torch.tensor([[4, 9, 3, 2, 1]])
    with torch.no_grad():
        hidden = policy.get_base_model().model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(critic.backbone(input_ids=ids).last_hidden_state, hidden, rtol=1e-4, atol=1e-5)


# Prompts


def position(position, **columns):
    return [value / 1000 for value in position]


def test_calibration_draws_rows_at_random(tmp_path, path):
    rows = Dataset.from_dict({"prompt": ["the film"] * 1000, "position": list(range(1000))})
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for data in (rows, rows.to_iterable_dataset(num_shards=2)):
        found = [row["position"] for row in random_rows(data, 100, 0)]
        assert len(set(found)) == 100 and 400 < sum(found) / 100 < 600
        assert found == [row["position"] for row in random_rows(data, 100, 0)]
        assert found != [row["position"] for row in random_rows(data, 100, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    few = [row["position"] for row in random_rows(rows.select(range(3)), 7, 0)]
    assert sorted(few[:3]) == [0, 1, 2] and few == [*few[:3], *few[:3], few[0]]
    trainer = make(tmp_path, path, rewards=[position], train_dataset=rows)
    assert 0.35 < trainer.sample_rewards(64).mean() < 0.65


@pytest.mark.parametrize(
    ("epoch", "found"), [(0.0, (0, 0)), (0.3, (0, 6)), (1.0, (0, 20)), (1.1, (1, 2)), (2.05, (2, 1))]
)
def test_position_on_a_stream(epoch, found):
    assert stream_position(TrainerState(epoch=epoch, max_steps=10), 2) == found


def on_a_stream(folder, path, checkpoint=None):
    data = prompts(16).add_column("position", list(range(0, 1000, 63)))
    trainer = make(
        folder, path, rewards=[low_ids, position], train_dataset=data.to_iterable_dataset(), max_steps=5,
        save_strategy="steps", save_steps=3, use_score_scaling=True, use_score_norm=True, critic_max_grad_norm=0.5,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def test_a_run_on_a_stream_resumes_in_a_later_pass(tmp_path, path):
    """Two rollouts of 8 are a pass over 16 prompts: step 3 lies in the middle of the second."""
    whole = on_a_stream(tmp_path / "a", path)
    logged = [entry for entry in whole.state.log_history if "loss" in entry]
    assert len(logged) == 5 and all(entry["critic/grad_norm"] > 0 for entry in logged)
    assert logged[-1]["epoch"] > 2 and len({entry["rewards/position/mean"] for entry in logged}) > 2
    resumed = on_a_stream(tmp_path / "b", path, str(tmp_path / "a" / "checkpoint-3"))
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    keys = ("loss", "epoch", "rewards/position/mean", "score_spread/low_ids", "critic/grad_norm")
    histories = [[{key: entry[key] for key in keys} for entry in trainer.state.log_history if "loss" in entry]
                 for trainer in (whole, resumed)]  # fmt: skip
    assert histories[0] == histories[1]
    assert resumed.scores.state_dict() == whole.scores.state_dict()


# Scores


def test_moments_by_hand():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(40, 2, generator=generator) * torch.tensor([0.1, 300.0]) + torch.tensor([5.0, -2.0])
    scores = ScoreScaling(["a", "b"], center=True, clip=1.5)
    for part in rewards.split((8, 1, 31)):
        scores.observe(part)
    whole = rewards.double()
    torch.testing.assert_close(scores.spreads(), whole.std(dim=0, unbiased=False))
    expected = ((whole - whole.mean(dim=0)) / whole.std(dim=0, unbiased=False)).clamp(-1.5, 1.5)
    torch.testing.assert_close(scores(rewards), expected.float())
    assert scores(rewards).abs().max() == 1.5
    other = ScoreScaling(["b", "a"], center=True, clip=1.5)
    other.load_state_dict(json.loads(json.dumps(scores.state_dict())))
    assert torch.equal(other(rewards.flip(1)), scores(rewards).flip(1))
    with pytest.raises(ValueError, match=r"no moments of the rewards \['c'\].*\['a', 'b'\]"):
        ScoreScaling(["c"]).load_state_dict(scores.state_dict())
    constant = ScoreScaling(["a"])
    constant.observe(torch.full((8, 1), 0.7))
    assert constant.spreads().tolist() == [0.0] and not constant(torch.full((8, 1), 0.7)).any()
    assert ScoreScaling(["a"], scale=False, clip=2.0)(torch.tensor([[3.0], [-1.0]])).tolist() == [[2.0], [-1.0]]


def test_rewards_times_a_factor_give_the_same_run(tmp_path, path):
    runs = {}
    for factor in (1.0, 30.0, 1000.0):

        def scaled(completion_ids, factor=factor, **columns):
            return [factor * (value + 5) for value in low_ids(completion_ids)]

        trainer = make(
            tmp_path, path, rewards=[scaled], use_score_scaling=True, use_score_norm=True, score_clip=2.5,
            missing_eos_penalty=1.0,
        )  # fmt: skip
        trainer.train()
        runs[factor] = [entry for entry in trainer.state.log_history if "loss" in entry]
    keys = ("loss", "grad_norm", "kl/per_response", "completions/mean_length", "critic/scaled/loss", "kl/update")
    for factor, run in runs.items():
        for entry, first in zip(run, runs[1.0], strict=True):
            assert {key: entry[key] for key in keys} == pytest.approx({key: first[key] for key in keys}, rel=1e-3)
            # The reward itself is logged
            assert entry["rewards/scaled/mean"] == pytest.approx(factor * first["rewards/scaled/mean"], rel=1e-5)
            assert entry["score_spread/scaled"] == pytest.approx(factor * first["score_spread/scaled"], rel=1e-4)


def test_clipping_range_in_spreads_of_the_returns(tmp_path, path):
    returns = torch.tensor([[[1.0, 3.0, 9.0]], [[10.0, 10.0, 9.0]]])
    values = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [7.0, 7.0]]])
    mask = torch.tensor([[1, 1, 0]])
    # Around the mean value 1: sqrt((0 + 4) / 2); around 0: 10
    found = value_clipranges(returns, values, mask, 0.2, lambda tensor: tensor)
    torch.testing.assert_close(found, torch.tensor([0.2 * 2**0.5, 2.0]))
    ranges = []
    for factor in (1.0, 1000.0):

        def scaled(completion_ids, factor=factor, **columns):
            return [factor * value for value in low_ids(completion_ids)]

        batch = rollout(make(tmp_path, path, rewards=[scaled], cliprange_value_unit="spread"))
        assert batch["value_clipranges"].shape == (8, 1, 2)
        ranges.append(batch["value_clipranges"][0, 0, 0])
    torch.testing.assert_close(ranges[1], 1000 * ranges[0])
    old, moved = torch.zeros(1, 2, 2), torch.full((1, 2, 2), 0.5)
    loss = clipped_value_loss(moved, old, torch.ones(1, 2, 2), torch.tensor([[[0.2, 1.0]]]))
    torch.testing.assert_close(loss[0, 0], torch.tensor([0.32, 0.125]))


def norm(parameters):
    return torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item()


def test_gradients_of_critic_and_policy_are_clipped_apart(tmp_path, path):
    trainer = make(tmp_path, path, critic="separate", critic_max_grad_norm=1e-3, max_grad_norm=0.25)
    with torch.no_grad():
        trainer.critic.heads.weight.fill_(0.1)
    critic = list(trainer.critic.parameters())
    policy = [p for name, p in trainer.model.named_parameters() if "value_heads" not in name]
    trainer._compute_loss(trainer.model, rollout(trainer)).backward()
    for parameter in policy:
        parameter.grad.mul_(100.0)
    before = norm(policy), norm(critic)
    assert before[0] > 0.25 and before[1] > 1e-3
    found = trainer._clip_grad_norm(trainer.model)
    assert float(found) == pytest.approx(before[0], rel=1e-4)
    assert (norm(policy), norm(critic)) == (pytest.approx(0.25, rel=1e-3), pytest.approx(1e-3, rel=1e-2))
    assert trainer._metrics["train"]["critic/grad_norm"] == [pytest.approx(before[1], rel=1e-4)]


# Dropout


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon"])
def test_no_kind_of_dropout_stays_on(family):
    """Modules, attributes that a function reads, and a configuration that a forward reads."""
    if family == "falcon":
        config = AutoConfig.for_model(
            "falcon", vocab_size=36, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
            hidden_dropout=0.5, attention_dropout=0.5,
        )  # fmt: skip
        model, name = AutoModelForCausalLM.from_config(config), "hidden_dropout"
    elif family == "gpt2":
        model, name = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5), "resid_pdrop"
    else:
        model, name = tiny_model("llama", attention_dropout=0.5), "attention_dropout"
    model.train()
    ids = torch.arange(10).view(1, 10) + 3
    first = [model(input_ids=ids).logits for _ in range(2)]
    assert not torch.equal(*first)
    found = disable_dropout(model)
    assert torch.equal(*[model(input_ids=ids).logits for _ in range(2)])
    assert getattr(model.config, name) == 0.0
    with stated_probabilities(found):
        assert getattr(model.config, name) == 0.5
    assert getattr(model.config, name) == 0.0


def test_dropout_is_off_in_policy_reference_and_critic_and_kept_in_what_is_saved(tmp_path):
    model = tiny_model("gpt2", attn_pdrop=0.3, resid_pdrop=0.3)
    trainer = make(tmp_path, model, critic="separate")
    dropouts = [module for one in (trainer.model, trainer.ref_model) for module in one.modules()
                if isinstance(module, torch.nn.Dropout)]  # fmt: skip
    assert len(dropouts) > 20 and all(module.p == 0 for module in dropouts)
    assert abs(kl_at_start(trainer)) < 1e-4
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["resid_pdrop"] == 0.3
    with_dropout = make(tmp_path, tiny_model("gpt2", attn_pdrop=0.3, resid_pdrop=0.3), disable_dropout=False)
    assert any(module.p == 0.3 for module in with_dropout.model.modules() if isinstance(module, torch.nn.Dropout))
    # What the warning is for: a policy that samples without dropout and is scored with it
    assert kl_at_start(with_dropout) < -0.1


# Logs and evaluation


def test_logged_advantages_are_those_of_the_policy(tmp_path, path):
    trainer = make(tmp_path, path, log_completions=True)
    batch = rollout(trainer)
    mask = batch["completion_mask"]
    means = (batch["advantages"] * mask).sum(dim=1) / mask.sum(dim=1)
    assert list(trainer._logs["advantages"]) == pytest.approx(means.tolist()) and means.abs().max() > 0.1
    assert "frac_reward_zero_std" not in trainer._metrics["train"] and "reward_std" in trainer._metrics["train"]
    groups = make(tmp_path, path, num_generations=2)
    rollout(groups)
    assert groups._metrics["train"]["frac_reward_zero_std"]


def test_completions_are_printed_under_rewards_of_any_name(tmp_path, path, capsys):
    def named(completion_ids, log_extra=None, **columns):
        log_extra("[bold]", ["seen"] * len(completion_ids))
        return low_ids(completion_ids)

    named.__name__ = "[/x]"
    trainer = make(tmp_path, path, rewards=(named,), log_completions=True, max_steps=1, num_completions_to_print=1)
    trainer.train()
    printed = capsys.readouterr().out
    assert "[/x]" in printed and "[bold]" in printed and "Advantage" in printed
    assert "[/x]" in pd.read_parquet(next((tmp_path / "completions").glob("*.parquet"))).columns


async def gold(gold, **columns):
    return gold


def test_one_of_several_sets_ends_the_run(tmp_path, path):
    sets = {name: prompts(8).add_column("gold", [value] * 8) for name, value in (("a", 1.0), ("b", 5.0))}
    trainer = make(
        tmp_path, path, max_steps=5, eval_strategy="steps", eval_steps=1, gold_patience=2,
        trainer_arguments={"eval_dataset": sets, "gold_reward": gold},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.stop_reason is not None
    stopping = trainer.controller.stopping
    assert (stopping.best_gold, stopping.num_gold_evaluations) == (1.0, 3)
    first, second = [entry for entry in trainer.state.log_history if "eval_a_gold" in entry or "eval_b_gold" in entry][
        :2
    ]
    assert (first["eval_a_gold"], first["eval_gold"]) == (1.0, 1.0) and first["eval_rewards/low_ids/mean"] > 0
    assert second["eval_b_gold"] == 5.0 and second["eval_b_rewards/low_ids/mean"] > 0
    assert "eval_gold" not in second and "eval_rewards/low_ids/mean" not in second
    metrics = trainer.evaluate()
    assert (metrics["eval_gold"], metrics["eval_a_gold"], metrics["eval_b_gold"]) == (1.0, 1.0, 5.0)


@pytest.mark.parametrize(
    ("metric", "found"), [(None, "a"), ("gold", "a"), ("eval_b_gold", "b"), ("b_loss", "b"), ("ab_gold", "ab")]
)
def test_set_that_counts(metric, found):
    assert gold_dataset(metric, {"a": 1, "b": 2, "ab": 3}) == found
    assert gold_dataset(metric, prompts(8)) is None


def test_gold_metrics_that_cannot_be_called_are_refused_at_once(tmp_path, path):
    for given, message in (("org/model", "got 'org/model'"), (tiny_model(), "got a `LlamaForCausalLM`")):
        with pytest.raises(TypeError, match=f"`gold_reward` must be a function.*{message}"):
            make(tmp_path, path, trainer_arguments={"gold_reward": given, "eval_dataset": prompts(8)})
