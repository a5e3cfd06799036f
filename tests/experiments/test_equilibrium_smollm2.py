"""The experiment on SmolLM2 as reward model and its use by constrained PPO, at a size that takes seconds."""

import json
import math
from pathlib import Path

import pytest

from recipes.experiments.equilibrium_smollm2 import run as experiment
from tests.helpers.tiny import save_tiny_model, tiny_pairs, tiny_tokenizer


def dialogues(number):
    rows = [{name: row[name].removesuffix(" <eos>") for name in row} for row in tiny_pairs(number)]
    for row in rows:
        start = f"\n\nHuman: {row.pop('prompt')}{experiment.ANSWER}"
        yield {side: start + answer for side, answer in row.items()}


def arguments_of(tmp_path, *words):
    (tmp_path / "hh.jsonl").write_text("\n".join(json.dumps(row) for row in dialogues(10)))
    settings = {
        "config": Path(experiment.__file__).parent / "config.yaml", "output_dir": tmp_path / "out", "max_steps": 2,
        "model_name_or_path": save_tiny_model(tmp_path / "model"), "hh_file": tmp_path / "hh.jsonl", "num_test": 4,
        "reward_batch": 2, "per_device_train_batch_size": 4, "max_completion_length": 4, "lora_layers": 1,
    }  # fmt: skip
    arguments = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return experiment.make_parser().parse_args_and_config([*arguments, *words])


def test_reward_models_are_trained_and_the_equilibrium_heads_is_used(tmp_path):
    mean = "EP, mean of tokens"
    parsed = arguments_of(tmp_path, "--reward_models", experiment.LINEAR, mean)
    experiment.main(*parsed)
    linear, head, policy = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert (linear["part"], head["part"], policy["part"]) == (experiment.LINEAR, mean, "constrained PPO")
    assert linear["pairs"] == head["pairs"] == 6 and linear["steps"] == head["steps"] == 3
    assert all(0 <= row["accuracy"] <= 1 and len(row["losses"]) == 3 for row in (linear, head))
    assert policy["threshold"] == head["chosen"] != linear["chosen"]
    assert [point["step"] for point in policy["curve"]] == [2] and math.isfinite(policy["curve"][0]["kl"])
    assert f"threshold {head['chosen']:.2f}" in (tmp_path / "out" / "results.md").read_text()


def test_pairs_are_short_and_answer_one_question(tmp_path):
    _, args = arguments_of(tmp_path)
    everything = experiment.read_pairs(args, tiny_tokenizer())
    assert [len(everything[name]) for name in ("train", "test")] == [6, 4]
    assert all(row["prompt"].endswith(experiment.ANSWER) for row in everything["train"])
    args.dialogue_tokens = 12  # six have fewer
    assert len(experiment.read_pairs(args, tiny_tokenizer())["train"]) == 2
    args.dialogue_tokens = 4
    with pytest.raises(ValueError, match="`hh_file` has 0 pairs"):
        experiment.read_pairs(args, tiny_tokenizer())
    with pytest.raises(ValueError, match="`used_reward`"):
        experiment.SmolLM2Arguments("model", "file", used_reward=experiment.LINEAR)
