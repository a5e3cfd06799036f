"""TRL's own scripts with our optimizers, through our command."""

import importlib
import json
import os
import re
import subprocess
import sys
from functools import partial

import pytest
import yaml

from tests.helpers.tiny import save_tiny_model, tiny_pairs
from trl_ext import cli, playground
from trl_ext.optim import AdamP, OptimizerReportCallback
from trl_ext.optim.callbacks import bottom_optimizer
from trl_ext.scripts import sft, trl_scripts
from trl_ext.scripts.recipe.strict_parser import RecipeError


def write_recipe(folder, **settings):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def base_settings(folder):
    return {
        "output_dir": str(folder / "out"), "max_steps": 2, "logging_steps": 1, "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "steps", "save_steps": 1, "optim": "adamp",
        "optim_args": "delta=0.1,wd_ratio=0.1", "per_device_train_batch_size": 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", cli.TRL_COMMANDS)
def test_recipes_are_strict_and_know_our_names(name, tmp_path, capsys):
    recipe = write_recipe(tmp_path, optim="adamp", learning_rate=1e-4, log_optimizer_report=True)
    parser = trl_scripts.make_parser(name)
    assert parser.check(["--config", recipe, "--optim", "sgdp"]) == {}
    with pytest.raises(RecipeError, match="`lerning_rate`.*did you mean `learning_rate`"):
        parser.check(["--config", write_recipe(tmp_path, lerning_rate=1e-4)])
    with pytest.raises(RecipeError, match="optim: 'adampp'.*must be one of.*'adamp', 'sgdp'"):
        parser.check(["--config", write_recipe(tmp_path, optim="adampp")])
    assert cli.main([name, "--config", write_recipe(tmp_path, lerning_rate=1e-4)]) == 2
    assert "did you mean `learning_rate`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim_args": "detla=0.1"}, "`optim_args: detla=0.1`: AdamP has no option `detla`; did you mean `delta`"),
        ({"model_name_or_path": None}, "`model_name_or_path` is missing"),
        ({"resume_from_checkpoint": "gone"}, "gone.*is not a folder"),
    ],
)
def test_wrong_settings_are_refused_before_the_model_is_loaded(settings, message, tmp_path):
    settings = {"model_name_or_path": "no/such-model", "dataset_name": "none", **base_settings(tmp_path), **settings}
    parsed = sft.make_parser().parse_args_and_config(["--config", write_recipe(tmp_path, **settings)])
    with pytest.raises(ValueError, match=message):
        sft.main(*parsed)


@pytest.mark.parametrize("name", [name for name in cli.TRL_COMMANDS if name != "sft"])  # `sft` below
def test_every_script_trains_with_adamp(name, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(OptimizerReportCallback, "on_train_end", lambda *_, optimizer, **__: seen.append(optimizer))
    monkeypatch.setattr(playground, "load_playground_dataset", partial(playground.load_playground_dataset, 16, 4))
    tokenizer = playground.build_tokenizer()
    model = save_tiny_model(tmp_path / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(model)
    settings = base_settings(tmp_path) | {
        "model_name_or_path": model,
        "dataset_name": "playground",
        "max_steps": 1,
        "log_optimizer_report": True,
    }
    if name in ("grpo", "rloo"):
        settings |= {"num_generations": 2, "max_completion_length": 4}
        settings |= {"reward_funcs": ["trl_ext.playground.sentiment_reward"]}
    script = importlib.import_module(cli.TRAINING_COMMANDS[name])
    script.main(*script.make_parser().parse_args_and_config(["--config", write_recipe(tmp_path, **settings)]))
    assert type(bottom_optimizer(seen[0])) is AdamP
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert "optimizer/projected/share" in state["log_history"][0]


def test_the_real_command(tmp_path):
    """Launches accelerate, trains a Qwen3 with AdamP, logs the report, saves, resumes."""
    tiny_pairs(8).select_columns("chosen").rename_column("chosen", "text").to_json(tmp_path / "data.jsonl")
    recipe = write_recipe(
        tmp_path,
        model_name_or_path=save_tiny_model(tmp_path / "model", "qwen3"),
        datasets=[{"path": "json", "data_files": str(tmp_path / "data.jsonl")}],
        log_optimizer_report=True,
        **{**base_settings(tmp_path), "optim_args": "delta=0.1,projection=auto", "gradient_checkpointing": False},
    )
    command = [sys.executable, "-m", "trl_ext.cli", "sft", "--config", recipe]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["optimizer/projected/weights"] for entry in logged] == [4.0, 4.0]  # Two a layer
    assert all(0 < entry["optimizer/projected/effective_step_size"] < 1 for entry in logged)
    assert re.search(r"1/2  loss .* projected ", done.stdout) and "Warning" not in done.stdout + done.stderr
    # TRL's scripts leave a card too, where they save no checkpoint as well, and say what else is there
    assert str(tmp_path / "out" / "README.md") in done.stdout
    assert str(tmp_path / "out" / "optimizer_report.json") in done.stdout
    assert "optim: adamp" in (tmp_path / "out" / "README.md").read_text()
    report = json.loads((tmp_path / "out" / "optimizer_report.json").read_text())
    assert report["model.layers.0.self_attn.q_proj.weight"]["channel"] == 1.0

    assert sum(row["channel"] > 0 for row in report.values()) == 4

    options = ["--config", recipe, "--max_steps", "3", "--resume_from_checkpoint", "true"]
    sft.main(*sft.make_parser().parse_args_and_config(options))
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]
