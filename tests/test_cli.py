import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import trl_ext
from tests.tiny import save_tiny_model, tiny_pairs
from trl_ext import cli
from trl_ext.scripts import sparse_po
from trl_ext.scripts.strict_parser import RecipeError


ROOT = Path(trl_ext.__file__).parents[1]


def write_recipe(folder, **settings):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def check(*arguments):
    sparse_po.make_parser().check(list(arguments))


def test_misspelt_keys_name_themselves_and_the_closest(tmp_path):
    recipe = write_recipe(tmp_path, betaa=0.5, mask_typ="ones", model_name_or_path="x")
    with pytest.raises(RecipeError) as error:
        check("--config", recipe, "--divergence_coeff", "1")
    for text in ("`betaa`", "`beta`", "`mask_typ`", "`mask_type`", "`divergence_coeff` in the command line", recipe):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"learning_rate": "fast"}, [], "learning_rate: 'fast'.*float"),
        ({"max_steps": True}, [], "max_steps: True.*int"),
        ({"mask_type": "dense"}, [], "mask_type: 'dense'.*one of"),
        ({"env": "A=1"}, [], "`env`"),
        ({}, ["--max_steps", "many"], "max_steps.*many"),
        ({}, ["--mask_type", "dense"], "mask_type.*dense"),
    ],
)
def test_wrong_values(settings, arguments, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        check("--config", write_recipe(tmp_path, **settings), *arguments)


def test_numbers_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"learning_rate: 1e-6\nuse_cpu: true\nbf16: false\noutput_dir: {tmp_path}\n")
    parsed = sparse_po.make_parser().parse_args_and_config(["--config", str(path), "--beta", "0.7"])
    assert parsed[1].learning_rate == 1e-6 and parsed[1].beta == 0.7


def test_repeated_key_missing_file_and_no_mapping(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("beta: 0.1\nbeta: 0.2\n")
    with pytest.raises(RecipeError, match="'beta'.*twice"):
        check("--config", str(path))
    with pytest.raises(RecipeError, match="missing.yaml` is not a file.*trl-ext recipes"):
        check("--config", "missing.yaml")
    path.write_text("- beta\n")
    with pytest.raises(RecipeError, match="must be a mapping.*list"):
        check("--config", str(path))
    with pytest.raises(RecipeError, match="needs the path"):
        check("--config")


def test_environment_is_set_only_when_the_recipe_is_accepted(tmp_path, monkeypatch):
    monkeypatch.delenv("TRL_EXT_TEST", raising=False)
    settings = {"env": {"TRL_EXT_TEST": 3}, "use_cpu": True, "bf16": False, "output_dir": str(tmp_path)}
    with pytest.raises(RecipeError):
        sparse_po.make_parser().parse_args_and_config(["--config", write_recipe(tmp_path, **settings, betaa=1)])
    assert "TRL_EXT_TEST" not in os.environ
    sparse_po.make_parser().parse_args_and_config(["--config", write_recipe(tmp_path, **settings)])
    assert os.environ["TRL_EXT_TEST"] == "3"


def test_lenient_parsing_is_refused():
    with pytest.raises(ValueError, match="fail_with_unknown_args"):
        sparse_po.make_parser().parse_args_and_config([], fail_with_unknown_args=False)


def test_launch_command():
    command = cli.launch_command(
        "module", ["--config", "r.yaml", "--accelerate_config", "zero3", "--num_processes", "4"]
    )
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    assert command[4].endswith("accelerate_configs/zero3.yaml")
    assert command[5:7] == ["--num_processes", "4"]
    assert command[-4:] == ["-m", "module", "--config", "r.yaml"]


def test_accelerate_configs_are_valid():
    assert {"single_process", "ddp", "zero1", "zero2", "zero3", "fsdp2", "cpu_zero2", "cpu_zero3"} <= set(
        cli.accelerate_configs()
    )
    from accelerate.commands.config.config_args import load_config_from_file

    for name in cli.accelerate_configs():
        assert load_config_from_file(cli.accelerate_config_path(name)).num_processes >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sparsepo"], "unknown command 'sparsepo'.*sparse-po"),
        (["sparse-po", "--accelerate_config", "zero9"], "zero9.*neither.*zero3"),
        (["sparse-po", "--num_processes"], "needs a value"),
        (["sparse-po", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["recipes", "nowhere"], "nowhere is not a folder"),
        (["demo", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_command_lines(arguments, message, capsys):
    import re

    assert cli.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_help_version_recipes(capsys):
    assert cli.main(["--help"]) == 0
    assert "sparse-po" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert trl_ext.__version__ in capsys.readouterr().out
    assert cli.main(["recipes", str(ROOT / "recipes")]) == 0
    assert "playground.yaml" in capsys.readouterr().out
    assert cli.main(["sparse-po", "--help"]) == 0
    assert "--divergence_coef" in capsys.readouterr().out
    assert cli.main([]) == 2


def test_the_real_command(tmp_path):
    """`trl-ext sparse-po` launches accelerate, trains, saves, and passes on the exit status."""
    tiny_pairs(8).to_json(tmp_path / "data.jsonl")
    recipe = write_recipe(
        tmp_path,
        model_name_or_path=save_tiny_model(tmp_path / "model"),
        datasets=[{"path": "json", "data_files": str(tmp_path / "data.jsonl")}],
        output_dir=str(tmp_path / "out"),
        max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
    )  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trl_ext.cli", "sparse-po", "--config", recipe]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").is_file() and (
        tmp_path / "out" / "token_masks.safetensors"
    ).is_file()
    failed = subprocess.run(
        [*command, "--resume_from_checkpoint", str(tmp_path / "nothing")],
        capture_output=True, text=True, timeout=200, env=environment,
    )  # fmt: skip
    assert failed.returncode != 0 and "is not a folder" in failed.stderr


def test_script_refuses_before_loading(tmp_path):
    recipe = write_recipe(tmp_path, model_name_or_path="no/such-model", betaa=1.0)
    done = subprocess.run(
        [sys.executable, "-m", "trl_ext.scripts.sparse_po", "--config", recipe],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode != 0
    assert "did you mean `beta`" in done.stderr and "Traceback" not in done.stderr
