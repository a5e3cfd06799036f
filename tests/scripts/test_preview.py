"""What a command line comes to, said without running it: `--print_config`, `--dry_run` and `--help`."""

import pytest
import yaml

from trl_ext import cli
from trl_ext.scripts.recipe import required


def printed(capsys, *arguments):
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_config_says_what_is_given_and_where_and_is_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--config",
        "constrained_ppo/playground",
        "--constraints.0.threshold",
        "4",
        "--beta=0",
        "--print_config",
    ]
    first = printed(capsys, "constrained-ppo", *arguments, "--print_config")
    given, on_command_line, rest = first.split("\n# ", 2)
    assert given.startswith("# Given: constrained_ppo/playground\n") and on_command_line.startswith(
        "Given: the command"
    )
    settings = yaml.safe_load(first)
    assert yaml.safe_load(on_command_line.partition("\n")[2]) == {
        "constraints": [{"reward": "count_positive_words", "threshold": 4}], "beta": 0.0,
    }  # fmt: skip
    assert yaml.safe_load(given)["max_steps"] == 120 and "max_steps" not in rest
    assert settings["gamma"] == 1.0 and settings["adam_beta1"] == 0.9 and settings["model_revision"] == "main"
    (tmp_path / "all.yaml").write_text(first)
    again = yaml.safe_load(printed(capsys, "constrained-ppo", "--config", "all.yaml", "--print-config"))
    assert again == settings


def test_a_token_is_not_printed(capsys):
    assert "secret" not in printed(capsys, "sparse-po", "--hub_token", "secret", "--print_config")


def test_dry_run_counts_batch_and_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n' * 1000)
    options = ["--config", "sparse_po/qwen3_lora_zero3", "--data_files", "pairs.jsonl", "--test_split_size", "0.1"]
    text = printed(capsys, "sparse-po", *options, "--accelerate_config", "zero3", "--num_processes", "4", "--dry_run")
    rows = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert rows["model"] == "Qwen/Qwen3-4B, weights in bfloat16, LoRA of rank 32"
    assert rows["batch"] == "2 x 8 accumulated x 4 processes = 64 pairs in a step"
    assert rows["steps"] == "15, 1 epochs of 900 rows"  # 900 / 64 = 14.1
    assert rows["processes"] == "4, zero3"
    assert rows["data"] == "pairs.jsonl, split train; evaluated on 0.1 of it"
    assert rows["saves"].endswith("after every epoch")
    assert max(map(len, text.splitlines())) <= 80


def test_dry_run_of_groups(capsys):
    text = printed(capsys, "constrained-grpo", "--config", "constrained_ppo/grpo_playground", "--dry_run")
    assert "1 process = 64 completions in a step, of 8 prompts" in text and "steps      80" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sparse-po"], "`model_name_or_path` is missing"),
        (["dpo", "--model_name_or_path", "x"], "No data"),
        (["constrained-ppo", "--model_name_or_path", "x", "--dataset_name", "x"], "`reward_funcs` is missing"),
        (["sparse-po", "--dry_runs"], "did you mean `dry_run`"),
    ],
)
def test_what_is_missing_is_said_before_a_launcher_starts(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(cli, "run_launcher", lambda *_: pytest.fail("launched"))
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "package"),
    [(["--use_peft"], "peft"), (["--load_in_4bit"], "bitsandbytes"), (["--deepspeed", "x.json"], "deepspeed")],
)
def test_a_package_that_is_missing_is_named(arguments, package, monkeypatch, capsys):
    real = required.find_spec
    monkeypatch.setattr(required, "find_spec", lambda name: None if name == package else real(name))
    monkeypatch.setattr(cli, "run_launcher", lambda *_: pytest.fail("launched"))
    assert cli.main(["sparse-po", "--config", "sparse_po/playground", *arguments]) == 2
    assert f"needs {package}, which is not installed: pip install" in capsys.readouterr().err


def test_help_has_this_packages_options_first(capsys):
    text = printed(capsys, "sparse-po", "--help")
    places = [text.index(part) for part in ("--config NAME", "--mask_type ", "--lora_r ", "--beta ", "--adam_beta1 ")]
    assert places == sorted(places)
    assert max(len(line) for line in text.splitlines() if "://" not in line) <= 80 and "--no_" not in text
    assert "--mask_init {positive,paper}\n" in text and "(default: positive)" in text
