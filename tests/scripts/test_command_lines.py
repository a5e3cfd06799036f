"""What a stranger sees of the commands: help within 80 columns, and errors before anything is loaded or trained."""

import logging
from types import SimpleNamespace

import pytest

from tests.helpers.tiny import save_tiny_model
from trl_ext import cli
from trl_ext.scripts.recipe import strict_parser
from trl_ext.scripts.recipe.required import require_files
from trl_ext.scripts.recipe.usage import description


COMMANDS = (
    "", "completion", "constrained-ppo", "data", "demo", "doctor", "pipeline", "plan", "proxy-points", "recipes",
    "sample-pairs", "sft", "sparse-po", "sweep",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    try:
        status = cli.main([*command.split(), "--help"])
    except SystemExit as end:  # of argparse
        status = end.code
    said = capsys.readouterr().out
    assert status == 0 and said.startswith("usage: ") and "python -m" not in said
    assert [line for line in said.splitlines() if len(line) > 80 and "https://" not in line] == []


def test_descriptions_speak_of_the_command_that_was_called():
    text = "What it does.\n\n# An example\npython -m trl_ext.scripts.sweep --config recipe.yaml --seeds 0"
    assert description(text, "trl-ext sweep").endswith("# An example\ntrl-ext sweep --config recipe.yaml --seeds 0")
    assert description(text).endswith("\npython -m trl_ext.scripts.sweep --config recipe.yaml --seeds 0")
    long = description(f"python -m trl_ext.scripts.sweep {'--option value ' * 9}", "trl-ext sweep")
    assert " \\\n    --option value" in long and max(map(len, long.splitlines())) <= 80


def files_of(**settings):
    class Arguments:
        datasets = settings.pop("datasets", None)

    for name, value in settings.items():
        setattr(Arguments, name, value)
    return Arguments


@pytest.mark.parametrize(
    ("data_files", "missing"),
    [
        ("nope.jsonl", "nope.jsonl"),
        (["here.jsonl", "nope.jsonl"], "nope.jsonl"),
        ({"train": "here.jsonl", "test": ["no/*.jsonl"]}, "no/*.jsonl"),
        ("*.jsonl", None),
        ("with[1].jsonl", None),
        ("https://host/nope.jsonl", None),
        ({"train": ["here.jsonl"]}, None),
    ],
)
def test_data_files_have_to_be_there(data_files, missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("here.jsonl", "with[1].jsonl"):
        (tmp_path / name).touch()
    arguments = files_of(datasets=[{"path": "json", "data_files": data_files}])
    if missing is None:
        require_files(arguments)
    else:
        with pytest.raises(ValueError, match="there is no such file in") as error:
            require_files(arguments)
        assert f"`data_files: {missing}`" in str(error.value)
    require_files(files_of(datasets=[{"path": "owner/name", "data_files": data_files}]))  # of the Hub


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_name_or_path": "empty"}, "`model_name_or_path: empty` is a folder without config.json"),
        ({"model_name_or_path": "./model"}, "there is no such folder"),
        ({"model_name_or_path": "outputs/run/checkpoint-9"}, "Name one with a model, or an id of the Hub"),
        ({"critic_model_name_or_path": "/nowhere"}, "`critic_model_name_or_path: /nowhere`: there is no such"),
        ({"reward_funcs": ["module.function", "outputs/a/b"]}, "`reward_funcs: outputs/a/b`"),
        ({"tokenizer_name_or_path": "empty"}, "a folder without tokenizer, so no tokenizer was saved in it"),
        ({"model_name_or_path": "gpt2", "reward_funcs": ["owner/name"], "tokenizer_name_or_path": None}, None),
    ],
)
def test_folders_have_to_hold_what_they_are_named_for(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if message is None:
        require_files(files_of(**settings, model=save_tiny_model(tmp_path / "model")))
        require_files(files_of(model_name_or_path=str(tmp_path / "model"), tokenizer_name_or_path="model"))
        return
    with pytest.raises(ValueError, match=message):
        require_files(files_of(**settings))


def test_a_command_says_what_is_missing_before_it_trains_the_playgrounds_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "run_launcher", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["sparse-po", "--config", "sparse_po/playground", "--data_files", str(tmp_path / "nope.jsonl")]
    assert cli.main(words) == 2
    assert "there is no such file" in capsys.readouterr().err and not (tmp_path / "cache").exists()
    assert cli.main([*words, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert (
        "\nmissing    `data_files:" in said and "\nsaves      outputs/sparse_po_playground, every 30 steps\n" in said
    )


def test_a_dry_run_shows_the_constraints(capsys):
    words = ["constrained-ppo", "--config", "constrained_ppo/playground", "--dry_run", "--constraints"]
    assert (
        cli.main([*words, '[{"reward": "a", "threshold": 0.9, "kind": "<="}, {"reward": "b", "quantile": 0.5}]']) == 0
    )
    said = capsys.readouterr().out
    assert "\nlimits     a <= 0.9; b quantile 0.5\n" in said and ", at the end alone\n" in said


class Parser:
    parsed = SimpleNamespace(model_name_or_path="gpt3")

    def parse_args_and_config(self):
        return ()


def test_what_libraries_say_while_a_parser_is_made_is_kept_back(monkeypatch, caplog):
    def make_parser():
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("other words")
        return Parser()

    monkeypatch.setattr(strict_parser.sys, "argv", ["/folder/script.py"])
    monkeypatch.delenv("TRL_EXT_VERBOSE", raising=False)
    strict_parser.run_strictly(make_parser, lambda: None)
    assert caplog.messages == ["other words"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("We couldn't connect to the Hub"), r"script.py: We couldn't.*\nGiven is `model_name_or_path: gpt3`"),
        (FileNotFoundError("Dataset 'x' doesn't exist on the Hub"), "script.py: Dataset 'x' doesn't exist"),
        (FileNotFoundError(2, "No such file or directory"), None),
        (RuntimeError("of the code"), None),
    ],
)
def test_what_a_library_says_of_a_missing_model_ends_a_run_without_a_traceback(error, message, monkeypatch):
    def main():
        raise error

    def train():
        raise error

    monkeypatch.setattr(strict_parser.sys, "argv", ["/folder/script.py"])
    if message is None:
        with pytest.raises(type(error)):
            strict_parser.run_strictly(Parser, main)
        return
    with pytest.raises(SystemExit, match=message):
        strict_parser.run_strictly(Parser, main)
    with pytest.raises(type(error)):  # a training has more to tell
        strict_parser.run_strictly(Parser, train)
    monkeypatch.setattr(strict_parser.sys, "argv", ["/folder/script.py", "--verbose"])
    with pytest.raises(type(error)):
        strict_parser.run_strictly(Parser, main)
