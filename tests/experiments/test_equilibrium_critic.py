"""The experiment on critics of constrained PPO, at a size that takes seconds."""

import json
import math
from pathlib import Path

import pytest
import torch

from recipes.experiments.equilibrium_critic import run as experiment
from tests.helpers.tiny import save_tiny_model, tiny_tokenizer


def test_every_critic_runs_and_is_kept(tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "policy")
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(experiment, "base_model_path", lambda **_: folder)
    settings = {
        "config": Path(experiment.__file__).parent / "config.yaml", "output_dir": tmp_path / "out", "max_steps": 2,
        "logging_steps": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "num_prompts": 4,
        "max_completion_length": 4, "rates": 0.001, "seeds": 0,
    }  # fmt: skip
    arguments = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    arguments += ["--widths", "4", "4", "--critics", "perceptron", "EP"]
    experiment.main(*experiment.make_parser().parse_args_and_config(arguments))
    rows = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert [row["critic"] for row in rows] == ["perceptron", "EP"]
    assert all(math.isfinite(row["value_loss"]) and 0 <= row["gold"] <= 1 for row in rows)
    assert all(len(row["history"]) == 1 for row in rows)  # one rollout for two updates
    assert (tmp_path / "out" / "results.md").read_text().count("| 0.001 |") == 2
    assert (tmp_path / "out" / "results.png").stat().st_size > 10_000


def test_perceptron_starts_at_zero_and_is_the_seeds():
    one, other = (experiment.perceptron(8, [4, 4], 2, seed=0) for _ in range(2))
    states = torch.randn(2, 3, 8)
    assert torch.equal(one(states), torch.zeros(2, 3, 2)) and torch.equal(one[0].weight, other[0].weight)


def test_rates_are_chosen_by_the_first_seeds_explained_variance():
    variances = {(0.1, 0): 0.2, (0.2, 0): 0.5, (0.1, 1): 0.9}
    rows = [
        {"critic": "EP", "rate": rate, "seed": seed, "explained_variance": variance}
        for (rate, seed), variance in variances.items()
    ]
    assert experiment.best_rate(rows, "EP", 0) == 0.2 and experiment.best_rate(rows, "EP", 1) == 0.1
    with pytest.raises(ValueError, match="`critics` has .*'mlp'"):
        experiment.CriticArguments(critics=["mlp"])
