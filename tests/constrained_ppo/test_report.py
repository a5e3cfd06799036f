import re

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import trl_ext
from tests.helpers.constrained_ppo import XI, low_ids, make, prompts
from trl_ext.constrained_ppo.checkpoint import critic_from_pretrained
from trl_ext.constrained_ppo.constrained_ppo_config import ConstrainedPPOConfig
from trl_ext.constrained_ppo.multipliers import Constraint
from trl_ext.constrained_ppo.report import method_section


def row(text, start):
    return next(line for line in text.splitlines() if line.startswith(f"| {start} |"))


def run_code(text):
    """Runs the card's code, as a reader would."""
    variables = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "trl_ext" in block or "AutoTokenizer" in block:
            exec(block, variables)
    return variables


def heads_moved(critic):
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


def test_card_of_a_constrained_run(tmp_path, path):
    trainer = make(
        tmp_path / "out", path, **XI, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        trainer_arguments={"eval_dataset": prompts(8), "gold_reward": low_ids},
    )  # fmt: skip
    trainer.train()
    assert "Rewards and constraints" in (tmp_path / "out" / "README.md").read_text()
    trainer.save_model(str(tmp_path / "saved"))
    text = (tmp_path / "saved" / "README.md").read_text()
    card = ModelCard(text)
    assert {"trl", "grpo", "trl_ext", "constrained-ppo"} <= set(card.data.tags)
    assert f"- trl_ext: {trl_ext.__version__}" in text and "moskovitz2024" in text and "papers/2310.04373" in text
    assert "| `method` | xi |" in text and "| `objective` | kl |" in text and "| `critic` | shared |" in text
    assert "| `multiplier_squash` | none |" in text
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    expected = [
        "`low_ids`", *(f"{logged[key]:.4g}" for key in ("rewards/low_ids/mean", "average/low_ids")), "== 0.7",
        *(f"{logged[f'{part}/low_ids']:.4g}" for part in ("violation", "multiplier", "weight")),
    ]  # fmt: skip
    assert row(text, "`low_ids`") == f"| {' | '.join(expected)} |"
    assert row(text, "`length`").split(" | ")[3] == "== 0.5"
    assert f"{logged['weight/objective']:.4g} |" in row(text, "the objective")
    assert f"KL from the reference: {logged['kl/per_response']:.4g} nats for a response" in text
    assert f"Gold metric: {logged['eval_gold']:.4g} at the end" in text and "not stopped early" in text


def test_code_of_the_card_loads_policy_and_critic(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the card names a folder as seen from where it was trained
    trainer = make(tmp_path / "out", path)
    heads_moved(trainer.critic)
    trainer.save_model(str(tmp_path / "saved"))
    text = (tmp_path / "saved" / "README.md").read_text()
    assert '"saved"' in text and str(tmp_path) not in text and "| constraint |" not in text
    loaded = run_code(text)
    inputs = loaded["inputs"]
    with torch.no_grad():
        hidden = trainer.model.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(loaded["values"], trainer.critic(hidden))
    assert loaded["values"].shape == (*inputs["input_ids"].shape, 3)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded["model"].state_dict().keys() == plain.state_dict().keys()


def test_code_of_the_card_loads_a_separate_critic(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    trainer = make(tmp_path, path, critic="separate", max_steps=1, learning_rate=1e-2)
    trainer.train()
    heads_moved(trainer.critic.heads)
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "from a backbone of its own" in text and "| `critic` | separate |" in text
    loaded = run_code(text)
    with torch.no_grad():
        expected = trainer.critic.eval()(loaded["inputs"]["input_ids"], loaded["inputs"]["attention_mask"])
    torch.testing.assert_close(loaded["values"], expected)
    assert not loaded["critic"].training and f"(batch, tokens, {expected.size(-1)})" in text


def test_imports_of_published_cards_still_work():
    with pytest.warns(DeprecationWarning, match="import `critic_from_pretrained` from `trl_ext`"):
        from trl_ext.constrained_ppo.run_state import critic_from_pretrained as old
    assert old is trl_ext.critic_from_pretrained is critic_from_pretrained
    with pytest.raises(ImportError, match="save_critic"):
        from trl_ext.constrained_ppo.run_state import save_critic  # noqa: F401


def test_a_critic_of_the_authors_own_is_refused_with_the_way_out(tmp_path, path):
    critic = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 3))
    trainer = make(tmp_path, path, trainer_arguments={"critic_model": critic})
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "module of the author's own" in text and "critic_from_pretrained" not in text
    with pytest.raises(ValueError, match="0.bias.*load_state_dict"):
        critic_from_pretrained(str(tmp_path))


def test_section_names_the_end_and_open_rewards():
    config = ConstrainedPPOConfig(
        "out", method="mu", constraints=[{"reward": "a", "threshold": 0.5}], kl_ceiling=9.0, use_cpu=True, bf16=False
    )
    log_history = [
        {"step": 1, "rewards/a/mean": 0.25, "rewards/b/mean": 2.0, "violation/a": 0.25, "eval_gold": 0.75},
        {"step": 2, "rewards/a/mean": 0.5, "rewards/b/mean": 3.0, "violation/a": -0.125, "eval_gold": 0.5},
    ]
    text = method_section(config, log_history, "org/m", [Constraint("a", 0.5, ">=")], "The KL is 9.5 nats.")
    assert row(text, "`a`") == "| `a` | 0.5 |  | >= 0.5 | -0.125 |  |  |"
    assert row(text, "`b`").startswith("| `b` | 3 |  | none |")
    assert "Training stopped early: The KL is 9.5 nats." in text and "not stopped" not in text
    assert "Gold metric: 0.5 at the end, at best 0.75 at step 1." in text and "| `kl_ceiling` | 9 |" in text
    assert "last rollouts logged, at step 2" in text and 'critic_from_pretrained("org/m")' in text
    untrained = method_section(config, [], "org/m", [Constraint("a", 0.5, ">=")])
    assert row(untrained, "`a`") == "| `a` |  |  | >= 0.5 |  |  |  |" and "stopped" not in untrained
