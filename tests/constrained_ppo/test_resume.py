"""A resumed run is the uninterrupted one, wherever it was cut."""

import json

import pytest
from peft import LoraConfig

from tests.helpers.constrained_ppo import XI, assert_same, length, low_ids, make, prompts


def run(folder, path, checkpoint=None, num_prompts=64, arguments=None, **settings):
    trainer = make(
        folder,
        path,
        trainer_arguments=arguments,
        **{**XI, "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "calibration_samples": 8, **settings},
    )
    trainer.train_dataset = prompts(num_prompts)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_iterations": 3},
        {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
        {"num_prompts": 16},
        {"num_prompts": 16, "num_iterations": 2},
        {"multiplier_update": "minibatch", "num_iterations": 2},
        {"method": "ppo", "constraints": [], "kl_target": 0.01, "critic": "separate"},
    ],
    ids=["rollouts", "epochs", "accumulation", "data-epochs", "both-epochs", "minibatch", "adaptive-separate"],
)
def test_resumed_equals_uninterrupted(settings, tmp_path, path):
    whole = run(tmp_path / "a", path, **settings)
    for step in (3, 4):
        resumed = run(tmp_path / str(step), path, str(tmp_path / "a" / f"checkpoint-{step}"), **settings)
        assert_same(whole, resumed)


def test_with_lora(tmp_path, path):
    arguments = {"peft_config": LoraConfig(target_modules=["q_proj"])}
    whole = run(tmp_path / "a", path, arguments=arguments, num_iterations=2)
    arguments = {"peft_config": LoraConfig(target_modules=["q_proj"])}
    resumed = run(tmp_path / "b", path, str(tmp_path / "a" / "checkpoint-3"), arguments=arguments, num_iterations=2)
    assert_same(whole, resumed)


def test_no_second_dual_step_on_one_rollout(tmp_path, path):
    run(tmp_path / "a", path, num_iterations=3, max_steps=4)
    resumed = run(tmp_path / "b", path, str(tmp_path / "a" / "checkpoint-4"), num_iterations=3, max_steps=6)
    assert resumed.multipliers.state_dict()["num_updates"] == 2


def test_quantile_is_resolved_once(tmp_path, path):
    constraints = [{"reward": "low_ids", "quantile": 0.9}]
    whole = run(tmp_path / "a", path, constraints=constraints, max_steps=3)
    threshold = whole.multipliers.constraints[0].threshold
    resumed = run(tmp_path / "b", path, str(tmp_path / "a" / "checkpoint-2"), constraints=constraints, max_steps=3)
    assert resumed.multipliers.constraints[0].threshold == threshold
    assert not (tmp_path / "b" / "calibration.json").exists()
    assert_same(whole, resumed)


def gold(completion_ids, **columns):
    return [1.0 - value for value in low_ids(completion_ids)]


def test_damaged_checkpoints_are_refused(tmp_path, path):
    run(tmp_path / "a", path, max_steps=2)
    checkpoint = tmp_path / "a" / "checkpoint-1"
    with pytest.raises(ValueError, match="2 multipliers and this run 1 constraints"):
        run(tmp_path / "b", path, str(checkpoint), constraints=[{"reward": "low_ids", "threshold": 0.7}])
    with pytest.raises(ValueError, match="other value heads.*Resume with the settings"):
        run(tmp_path / "c", path, str(checkpoint), critic="separate")
    constraints = [{"reward": "low_ids", "threshold": 0.7}, {"reward": 1, "threshold": 0.5}]
    with pytest.raises(ValueError, match=r"for the rewards \['low_ids', 'length'\], and this run has .*'gold'"):
        run(tmp_path / "f", path, str(checkpoint), rewards=[low_ids, length, gold], constraints=constraints)
    (checkpoint / "multipliers.json").write_text(json.dumps({"values": [0.0]})[:-3])
    with pytest.raises(ValueError, match="multipliers.json is not valid JSON.*another"):
        run(tmp_path / "d", path, str(checkpoint))
    (checkpoint / "multipliers.json").unlink()
    with pytest.raises(ValueError, match="no multipliers.json.*method"):
        run(tmp_path / "e", path, str(checkpoint))
