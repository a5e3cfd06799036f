"""A resumed run is the uninterrupted one, wherever it was cut."""

import json
import logging

import pytest
from peft import LoraConfig

from tests.helpers.constrained_ppo import XI, assert_same, length, low_ids, make, prompts
from trl_ext.core.checkpoint import MANIFEST_FILE
from trl_ext.core.status import RunError


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


def test_checkpoints_of_other_settings_are_refused(tmp_path, path):
    """Where the manifest is missing, what is restored tells."""
    run(tmp_path / "a", path, max_steps=2)
    checkpoint = tmp_path / "a" / "checkpoint-1"
    one = [{"reward": "low_ids", "threshold": 0.7}]
    two = [*one, {"reward": 1, "threshold": 0.5}]
    with pytest.raises(RunError, match="checkpoint-1.*`constraints` is .*'low_ids'.* here and was .*'length'"):
        run(tmp_path / "b", path, str(checkpoint), constraints=one)
    with pytest.raises(RunError, match="`critic` is 'separate' here and was 'shared'"):
        run(tmp_path / "c", path, str(checkpoint), critic="separate")
    swapped = [one[0], {"reward": "length", "threshold": 0.5}]
    with pytest.raises(RunError, match=r"`rewards` is \['length', 'low_ids'\] here and was \['low_ids', 'length'\]"):
        run(tmp_path / "d", path, str(checkpoint), rewards=[length, low_ids], constraints=swapped)
    (checkpoint / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match="2 multipliers and this run 1 constraints"):
        run(tmp_path / "b", path, str(checkpoint), constraints=one)
    with pytest.raises(ValueError, match="other value heads.*Resume with the settings"):
        run(tmp_path / "c", path, str(checkpoint), critic="separate")
    for rewards in ([low_ids, length, gold], [length, low_ids]):
        with pytest.raises(ValueError, match=r"for the rewards \['low_ids', 'length'\], and this run has .*'l"):
            run(tmp_path / "f", path, str(checkpoint), rewards=rewards, constraints=two)
    (checkpoint / "multipliers.json").write_text(json.dumps({"values": [0.0]})[:-3])
    with pytest.raises(RunError, match="multipliers.json is not whole"):
        run(tmp_path / "d", path, str(checkpoint))
    (checkpoint / "multipliers.json").unlink()
    with pytest.raises(ValueError, match="no multipliers.json.*method"):
        run(tmp_path / "e", path, str(checkpoint))


def test_what_changes_on_the_way(tmp_path, path, caplog):
    """Constraints in another order are the same run; thresholds and the coefficient are the recipe's."""
    settings = {"num_iterations": 2, "kl_coef": 0.1, "max_steps": 5}
    whole = run(tmp_path / "a", path, **settings)
    checkpoint = str(tmp_path / "a" / "checkpoint-3")  # between two updates on one rollout
    first, second = {"reward": "low_ids", "threshold": 0.7}, {"reward": "length", "threshold": 0.5}
    turned = run(tmp_path / "b", path, checkpoint, constraints=[second, first], **settings)
    names = whole.controller.keys
    assert turned.controller.keys == names[::-1]
    found = dict(zip(turned.controller.keys, turned.multipliers.values().tolist(), strict=True))
    assert (
        found == dict(zip(names, whole.multipliers.values().tolist(), strict=True)) and len(set(found.values())) == 2
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        changed = run(
            tmp_path / "c", path, checkpoint, constraints=[{**first, "threshold": 0.9}, second],
            **{**settings, "kl_coef": 0.3, "num_iterations": 1},
        )  # fmt: skip
    assert [one.threshold for one in changed.multipliers.constraints] == [0.9, 0.5]
    assert changed.controller.kl_coef == 0.3
    assert "`threshold of low_ids` is" in caplog.text and "`kl_coef` is 0.3 (was 0.1)" in caplog.text
    assert "The open rollout of checkpoint-3 is left out" in caplog.text and "`num_iterations`" in caplog.text
    relative = [{"reward": "low_ids", "quantile": 0.5}, second]
    with pytest.raises(RunError, match="'low_ids' is stated relative to the policy before training"):
        run(tmp_path / "d", path, checkpoint, constraints=relative, **settings)


def test_a_run_that_was_stopped_stays_stopped(tmp_path, path):
    settings = {"kl_ceiling": 1e-9, "learning_rate": 0.05}
    stopped = run(tmp_path / "a", path, **settings)
    step = stopped.state.global_step
    assert step < 6 and stopped.stop_reason
    before = (tmp_path / "a" / f"checkpoint-{step}" / "model.safetensors").read_bytes()
    again = run(tmp_path / "a", path, True, **settings)
    assert again.state.global_step == step and again.stop_reason == stopped.stop_reason
    assert (tmp_path / "a" / f"checkpoint-{step}" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "a" / "stop_reason.json").is_file()
    on = run(tmp_path / "a", path, True, **{**settings, "kl_ceiling": None})
    assert on.state.global_step == 6 and on.stop_reason is None
    assert not (tmp_path / "a" / "stop_reason.json").exists()
