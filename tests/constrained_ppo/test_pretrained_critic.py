import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.helpers.constrained_ppo import length, low_ids, make
from tests.helpers.tiny import WORDS
from trl_ext.constrained_ppo.critic import SeparateCritic, ValueHeads


IDS = torch.arange(24).view(3, 8) % (len(WORDS) - 3) + 3


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, path):
    folder = tmp_path_factory.mktemp("reward_model")
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("given", ["name", "model"])
def test_values_of_a_score_head_are_the_reward_at_the_last_token(given, tmp_path, path, reward_model):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    settings = {"critic": "separate", "critic_score_reward": "length"}
    arguments = {}
    if given == "name":
        settings["critic_model_name_or_path"] = reward_model
    else:
        arguments["critic_model"] = model
    trainer = make(tmp_path, path, trainer_arguments=arguments, **settings)
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        values = trainer.critic.eval()(IDS, mask)
        expected = model(input_ids=IDS, attention_mask=mask).logits
    torch.testing.assert_close(values[:, -1, 1:2], expected)
    assert expected.abs().min() > 0.01
    assert torch.count_nonzero(values[..., 0]) == 0 and torch.count_nonzero(values[..., 2]) == 0
    own = {id(parameter) for parameter in trainer.critic.parameters()}
    assert not any(id(parameter) in own for parameter in model.parameters())


@pytest.fixture(scope="module")
def saved(tmp_path_factory, path):
    """A policy with its value heads beside it."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = make(folder, path)
    with torch.no_grad():
        for parameter in trainer.critic.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    trainer.save_model(str(folder))
    return str(folder), trainer.critic


def test_a_saved_critic_goes_on_by_name(saved, tmp_path, path):
    folder, critic = saved

    def new(completion_ids, **columns):
        return [1.0 for _ in completion_ids]

    trainer = make(tmp_path, path, rewards=[length, new, low_ids], trainer_arguments={"critic_model": folder})
    found = trainer.critic
    assert isinstance(found, ValueHeads)
    for place, earlier in ((0, 1), (2, 0), (3, 2)):  # length, low_ids, the KL
        assert torch.equal(found.weight[place], critic.weight[earlier])
        assert torch.equal(found.bias[place], critic.bias[earlier])
    assert torch.count_nonzero(found.weight[1]) == 0


def test_heads_saved_with_a_policy_become_a_separate_critic(saved, tmp_path, path):
    folder, critic = saved
    trainer = make(tmp_path, path, critic="separate", critic_model_name_or_path=folder)
    assert isinstance(trainer.critic, SeparateCritic)
    policy = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = critic(policy.base_model(IDS).last_hidden_state)
        torch.testing.assert_close(trainer.critic.eval()(IDS, torch.ones_like(IDS)), expected)
    # A separate critic is saved and goes on as well
    trainer.save_model(str(tmp_path / "separate"))
    again = make(tmp_path, path, critic="separate", trainer_arguments={"critic_model": str(tmp_path / "separate")})
    with torch.no_grad():
        torch.testing.assert_close(again.critic.eval()(IDS, torch.ones_like(IDS)), expected)
    assert all(parameter.requires_grad for parameter in again.critic.parameters())
    with pytest.raises(ValueError, match="backbone of its own. Set `critic='separate'`"):
        make(tmp_path, path, trainer_arguments={"critic_model": str(tmp_path / "separate")})


def test_critics_that_do_not_fit(saved, tmp_path, path, reward_model):
    folder, _ = saved

    def other(completion_ids, **columns):
        return [1.0 for _ in completion_ids]

    arguments = {"critic_model": folder}
    with pytest.raises(
        ValueError, match=r"values of the rewards \['low_ids', 'length'\], and this run has \['other'\]"
    ):
        make(tmp_path, path, rewards=[other], trainer_arguments=arguments)
    with pytest.raises(ValueError, match="has linear heads, and `critic_head='equilibrium'`"):
        make(tmp_path, path, trainer_arguments=arguments, critic_head="equilibrium")
    scored = {"critic": "separate", "critic_model_name_or_path": reward_model}
    with pytest.raises(ValueError, match="`critic_score_reward='other'` names no reward"):
        make(tmp_path, path, critic_score_reward="other", **scored)
    scored["critic_model_name_or_path"] = path
    with pytest.raises(ValueError, match="trained linear head `score`"):
        make(tmp_path, path, critic_score_reward="length", **scored)
