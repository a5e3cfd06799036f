import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests import glossary
from tests.helpers.constrained_ppo import length, low_ids, make, rollout
from tests.helpers.tiny import tiny_tokenizer
from trl_ext.constrained_ppo.ensemble import DisagreementAlarm, RewardEnsemble


def high_ids(completion_ids, **columns):
    return [1 - share for share in low_ids(completion_ids)]


def test_mean_and_disagreement_come_from_one_call():
    calls = []

    def member(factor):
        def scored(completions, **columns):
            calls.append(factor)
            return [factor * len(text) for text in completions]

        return scored

    ensemble = RewardEnsemble([member(1.0), member(2.0), member(6.0)], name="size")
    batch = {"prompts": ["a", "b"], "completions": ["x", "yyy"], "completion_ids": [[1], [2]]}
    assert ensemble(**batch) == [3.0, 9.0]
    # sqrt((4 + 1 + 9) / 3) for a length of 1
    assert ensemble.disagreement(**batch) == pytest.approx([(14 / 3) ** 0.5, 3 * (14 / 3) ** 0.5])
    assert calls == [1.0, 2.0, 6.0] and ensemble.disagreement.__name__ == "size_disagreement"
    ensemble(**{**batch, "completions": ["x", "y"]})
    assert len(calls) == 6


def test_members_may_be_models(tmp_path, path):
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    model.save_pretrained(tmp_path / "reward")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "reward")
    ensemble = RewardEnsemble([str(tmp_path / "reward"), lambda completions, **columns: [0.0] * len(completions)])
    prompts, completions = ["the film", "a"], [" was good", " book was very dull"]
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            expected.append(float(model.eval()(**tokenizer(prompt + completion, return_tensors="pt")).logits) / 2)
    found = ensemble(prompts=prompts, completions=completions, completion_ids=[[1], [2]])
    assert found == pytest.approx(expected, rel=1e-4) and abs(expected[0] - expected[1]) > 1e-3
    messages = [[{"role": "user", "content": text}] for text in prompts]
    replies = [[{"role": "assistant", "content": text.strip()}] for text in completions]
    assert len(ensemble(prompts=messages, completions=replies, completion_ids=[[1], [2]])) == 2


def test_alarm_by_hand():
    alarm = DisagreementAlarm("size", num_samples=4, deviations=2.0)
    assert alarm.check([1.0, 3.0]) is None and alarm.excess(9.0) is None
    resumed = DisagreementAlarm("size", num_samples=4, deviations=2.0)
    resumed.load_state_dict(alarm.state_dict())
    for one in (alarm, resumed):
        assert one.check([1.0, 3.0]) is None  # mean 2, spread 1
        assert one.check([4.0, 3.9]) is None
        assert "'size' disagree by 4.1 on average, above 4:" in one.check([4.1, 4.1])
        assert one.excess(5.0) == 3.0


def test_disagreement_is_constrained_logged_and_ends_a_run(tmp_path, path):
    class Drifting:
        """Agrees with `low_ids` until the third rollout."""

        num_calls = 0

        def __call__(self, completion_ids, **columns):
            self.num_calls += 1
            noise = [0.01 * (len(ids) % 2) for ids in completion_ids]
            drift = 1.0 if self.num_calls > 3 else 0.0
            return [a + b + drift for a, b in zip(low_ids(completion_ids), noise, strict=True)]

    ensemble = RewardEnsemble([low_ids, Drifting()], name="low")
    settings = {
        "objective": "rewards", "method": None, "reward_weights": [1.0, 0.0], "max_steps": 6, "ensemble_alarm": "stop",
        "constraints": [{"reward": "low_disagreement", "threshold": 0.1, "kind": "<="}],
    }  # fmt: skip
    trainer = make(tmp_path, path, rewards=[ensemble, ensemble.disagreement], **settings)
    trainer.train()
    assert trainer.state.global_step == 4 and "ensemble 'low'" in trainer.stop_reason
    entries = [entry for entry in trainer.state.log_history if "disagreement/low" in entry]
    assert [entry["disagreement/low"] > 0.4 for entry in entries] == [False, False, False, True]
    assert entries[-1]["violation/low_disagreement"] == pytest.approx(entries[-1]["disagreement/low"] - 0.1, abs=1e-6)
    assert entries[-1]["disagreement_deviations/low"] > 2 and "disagreement_deviations/low" not in entries[0]
    assert glossary.unknown(trainer.state.log_history) == set()


def test_ensembles_that_cannot_be_used(tmp_path, path):
    with pytest.raises(ValueError, match="two rewards or more, got 1"):
        RewardEnsemble([low_ids])
    with pytest.raises(ValueError, match="1 entries and the ensemble 'e' 2 members"):
        RewardEnsemble([low_ids, length], name="e", processing_classes=[None])

    async def later(**columns):
        return [1.0]

    with pytest.raises(ValueError, match="async member"):
        RewardEnsemble([low_ids, later])
    ensemble = RewardEnsemble([low_ids, high_ids], name="e")
    with pytest.raises(ValueError, match="'e_disagreement' the weight 1"):
        make(tmp_path, path, rewards=[ensemble, ensemble.disagreement])
    with pytest.raises(ValueError, match="Two ensembles have the name 'e'"):
        make(tmp_path, path, rewards=[ensemble, RewardEnsemble([low_ids, length], name="e")])
    trainer = make(tmp_path, path, rewards=[RewardEnsemble([low_ids, lambda **columns: [1.0]], name="e")])
    with pytest.raises(ValueError, match="Member 1 of the ensemble 'e' returned 1 rewards for 8") as caught:
        rollout(trainer)
    assert caught.value.__notes__ == [
        "The reward 'e' failed on a batch of 8 prompts, of which the first is 'the film'."
    ]
