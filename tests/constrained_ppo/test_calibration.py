import json
import logging
import re

import pytest
import torch
from datasets import Dataset
from rich.console import Console

from tests.helpers.constrained_ppo import XI, length, low_ids, make, prompts
from trl_ext.constrained_ppo.calibration import calibrate
from trl_ext.constrained_ppo.multipliers import Constraint
from trl_ext.constrained_ppo.report import calibration_table


SAMPLES = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])


def test_calibration_by_hand():
    found = calibrate(Constraint("a", 3.0, ">="), "a", SAMPLES)
    assert (found.mean, found.lowest, found.highest, found.rank) == (2.0, 0.0, 4.0, 0.8)
    assert found.spread == pytest.approx(2**0.5) and found.deviations == pytest.approx(2**-0.5)
    assert found.quantiles == pytest.approx((0.2, 1.0, 2.0, 3.0, 3.8)) and found.warnings == ()


@pytest.mark.parametrize(
    ("kind", "threshold", "message"),
    [
        (">=", 5.0, r"`a >= 5` may be out of reach.*\[0, 4\] with mean 2.*below 4.*quantile"),
        ("==", 5.0, "out of reach.*below 4"),
        ("==", -1.0, "out of reach.*above 0"),
        ("<=", -1.0, "out of reach.*above 0"),
        (">=", 1.0, "`a >= 1` is already satisfied"),
        ("<=", 3.0, "already satisfied"),
        ("==", 2.0, "already satisfied"),
        (">=", 0.0, "`a >= 0` is inert.*every sample satisfies it.*Tighten"),
        ("<=", 4.0, "inert"),
        (">=", 3.0, None),
        ("<=", 1.0, None),
        ("==", 3.0, None),
    ],
)
def test_warnings(kind, threshold, message):
    found = calibrate(Constraint("a", threshold, kind), "a", SAMPLES).warnings
    if message is None:
        assert found == ()
    else:
        (warning,) = found
        assert re.search(message, warning), warning


def test_constant_reward_is_inert():
    (warning,) = calibrate(Constraint("a", 1.0, ">="), "a", torch.full((4,), 0.3)).warnings
    assert "is inert: the reward is 0.3 on all 4 samples" in warning and "Check the reward function" in warning
    with pytest.raises(ValueError, match="'a' needs a threshold and samples"):
        calibrate(Constraint("a", quantile=0.5), "a", SAMPLES)


@pytest.mark.parametrize("name", ["words", "helpfulness_of_the_reward_model_of_the_second_round"])
def test_table_names_every_constraint_within_eighty_columns(name):
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    samples = [(Constraint(name, 3.0, ">="), SAMPLES), (Constraint(name, -3e4, ">="), -1.2345e4 * SAMPLES)]
    console.print(calibration_table([calibrate(constraint, name, sample) for constraint, sample in samples]))
    lines = console.export_text().splitlines()
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80 and "…" not in text and "80%" in text and "+0.71" in text
    assert re.search("(?:[^\n]*\n)?".join(map(re.escape, name)), text) and ">= 3" in text


def constant(completion_ids, **columns):
    return [0.25 for _ in completion_ids]


def test_calibration_before_training(tmp_path, path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trl_ext"), "propagate", True)
    constraints = [
        {"reward": "low_ids", "quantile": 0.75},
        {"reward": "length", "relative_gain": 0.5},
        {"reward": "constant", "threshold": 0.25},
    ]
    trainer = make(
        tmp_path, path, rewards=[low_ids, length, constant], max_steps=1, **{**XI, "constraints": constraints},
        calibration_samples=20,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.train()
    rows = json.loads((tmp_path / "calibration.json").read_text())
    assert [row["reward"] for row in rows] == ["low_ids", "length", "constant"]
    assert rows[0]["threshold"] == pytest.approx(rows[0]["quantiles"][3])
    assert rows[1]["threshold"] == pytest.approx(1.5 * rows[1]["mean"])
    assert [c.threshold for c in trainer.multipliers.constraints] == [row["threshold"] for row in rows]
    assert trainer.controller.constraints[0].threshold == rows[0]["threshold"]
    assert "is inert: the reward is 0.25" in caplog.text


def test_calibration_changes_nothing_else(tmp_path, path):
    runs = []
    for samples in (0, 24):
        trainer = make(tmp_path / str(samples), path, **{**XI, "method": "xi-paper"}, calibration_samples=samples)
        trainer.train()
        runs.append(trainer)
    for (name, p), (_, q) in zip(runs[0].model.named_parameters(), runs[1].model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    kept = [[entry.get("rewards/low_ids/mean") for entry in trainer.state.log_history] for trainer in runs]
    assert kept[0] == kept[1]


def test_samples_are_counted_and_streams_of_prompts_work(tmp_path, path):
    trainer = make(tmp_path, path, num_generations_eval=2, per_device_eval_batch_size=8)
    assert trainer.sample_rewards(9).shape == (32, 2)
    trainer.train_dataset = prompts(8).to_iterable_dataset()
    assert trainer.sample_rewards(8).shape == (16, 2)
    assert not trainer._metrics["eval"] and not trainer._logs["prompt"]


def test_too_few_prompts(tmp_path, path):
    messages = {0: "train dataset is empty.*'prompt'", 3: "`train_dataset` has 3 prompts and one rollout takes 8"}
    for count, message in messages.items():
        few = Dataset.from_dict({"prompt": ["the film"] * count})
        with pytest.raises(ValueError, match=message):
            make(tmp_path, path, train_dataset=few)
