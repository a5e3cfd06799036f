"""The migration table names what exists, and every argument of TRL 1.12's PPO."""

import ast
import inspect
import re
from dataclasses import MISSING
from pathlib import Path

import pytest
from trl import GRPOTrainer

import trl_ext
from tests.helpers.constrained_ppo import make
from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer
from trl_ext.constrained_ppo.retired import RETIRED


PAGE = (Path(trl_ext.__file__).parents[1] / "docs" / "migrating_from_trl_ppo.md").read_text()
# Own fields of `trl.experimental.ppo.PPOConfig` in 1.12.0, with their defaults
PPO_CONFIG = {
    "learning_rate": 3e-6, "dataset_num_proc": None, "num_mini_batches": 1, "total_episodes": None,
    "local_rollout_forward_batch_size": 64, "num_sample_generations": 10, "response_length": 53, "stop_token": None,
    "stop_token_id": None, "temperature": 0.7, "missing_eos_penalty": None,
    "sft_model_path": "EleutherAI/pythia-160m", "world_size": None, "num_total_batches": None,
    "micro_batch_size": None, "local_batch_size": None, "batch_size": None, "local_mini_batch_size": None,
    "mini_batch_size": None, "push_to_hub": False, "reward_model_path": "EleutherAI/pythia-160m",
    "model_adapter_name": None, "ref_adapter_name": None, "num_ppo_epochs": 4, "whiten_rewards": False,
    "kl_coef": 0.05, "kl_estimator": "k1", "cliprange": 0.2, "vf_coef": 0.1, "cliprange_value": 0.2, "gamma": 1.0,
    "lam": 0.95, "ds3_gather_for_generation": True,
}  # fmt: skip
PPO_TRAINER = [
    "args", "processing_class", "model", "ref_model", "reward_model", "train_dataset", "value_model", "data_collator",
    "eval_dataset", "optimizers", "callbacks", "peft_config",
]  # fmt: skip
FIELDS = ConstrainedPPOConfig.__dataclass_fields__
ARGUMENTS = {
    *inspect.signature(ConstrainedPPOTrainer.__init__).parameters,
    *inspect.signature(GRPOTrainer.__init__).parameters,
}


def rows(heading):
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell):
    """Names in backquotes that are identifiers."""
    return [name for name in re.findall(r"`([^`]*)`", cell) if name.isidentifier()]


def test_every_field_of_ppo_config_is_there_with_its_default():
    listed = {names(row[0])[0]: ast.literal_eval(row[1].strip("`")) for row in rows("`PPOConfig`")}
    assert listed == PPO_CONFIG


def test_every_argument_of_ppo_trainer_is_there():
    assert [names(row[0])[0] for row in rows("`PPOTrainer`")] == PPO_TRAINER


def test_what_it_is_here_exists_with_its_default():
    found = 0
    for row in rows("`PPOConfig`"):
        if row[2] == "none":
            assert not row[3]
            continue
        (name,) = names(row[2])
        assert name in FIELDS or name in ARGUMENTS, name
        if name in FIELDS:
            field = FIELDS[name]
            default = field.default if field.default_factory is MISSING else field.default_factory()
            assert default is not MISSING and ast.literal_eval(row[3].strip("`")) == default, name
            found += 1
    assert found > 15
    for row in rows("`PPOTrainer`"):
        assert row[1] == "none" or names(row[1])[0] in ARGUMENTS, row


def test_names_in_the_notes_exist():
    recipe_only = {"model_name_or_path", "prompt", "ConstrainedPPOConfig"}
    for row in [*rows("`PPOConfig`"), *rows("`PPOTrainer`")]:
        unknown = set(names(row[-1])) - FIELDS.keys() - ARGUMENTS - recipe_only
        assert not unknown, unknown


def test_the_example_builds_the_configuration_it_promises():
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    calls = {node.func.id: node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name)}  # fmt: skip
    assert {keyword.arg for keyword in calls["ConstrainedPPOTrainer"].keywords} <= ARGUMENTS
    settings = {k.arg: ast.literal_eval(k.value) for k in calls["ConstrainedPPOConfig"].keywords}
    config = ConstrainedPPOConfig(**settings, use_cpu=True, bf16=False)
    # 10,000 episodes: rollouts of 64, each of which is 4 minibatches in 4 epochs
    assert config.generation_batch_size == 64
    updates = config.steps_per_generation // config.gradient_accumulation_steps * config.num_iterations
    assert config.max_steps == pytest.approx(10_000 / 64 * updates)
    same = {"temperature", "kl_coef", "gamma", "vf_coef", "learning_rate", "cliprange_value"}
    assert {name: getattr(config, name) for name in same} == {name: PPO_CONFIG[name] for name in same}


def test_errors_name_what_takes_the_place(tmp_path, path):
    filled_in = {names(row[0])[0] for row in rows("`PPOConfig`") if row[4].startswith("Was filled in")}
    for heading in ("`PPOConfig`", "`PPOTrainer`"):
        for row in rows(heading):
            (old,), here = names(row[0]), row[2 if heading == "`PPOConfig`" else 1]
            if old in FIELDS or old in ARGUMENTS or old in filled_in:
                continue
            assert here == "none" or names(here)[0] in RETIRED[old], old
            assert RETIRED[old]
    assert not RETIRED.keys() & (FIELDS.keys() | ARGUMENTS)
    with pytest.raises(TypeError, match="`total_episodes` is an argument of TRL's PPO.*`max_steps`.*migrating"):
        ConstrainedPPOConfig(str(tmp_path), method="ppo", total_episodes=10_000)
    for name in ("value_model", "reward_model", "data_collator"):
        with pytest.raises(TypeError, match=f"`{name}` is an argument of TRL's PPO and none of `ConstrainedPPOTrain"):
            make(tmp_path, path, trainer_arguments={name: None})
    with pytest.raises(TypeError, match="no_such_name"):
        ConstrainedPPOConfig(str(tmp_path), no_such_name=1)


def test_metrics_are_logged(tmp_path, path):
    trainer = make(tmp_path, path, max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    listed = [names_of_metrics(row[1]) for row in rows("Metrics")]
    assert len(listed) > 4
    for name in listed:
        assert name.replace("<reward>", "low_ids") in logged, name


def names_of_metrics(cell):
    return re.findall(r"`([^`]*)`", cell)[0]
