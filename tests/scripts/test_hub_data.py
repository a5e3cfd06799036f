"""Data of the Hub in the form that a recipe wants."""

import json

from datasets import Dataset

from trl_ext import cli
from trl_ext.rewards import completion_tokens
from trl_ext.scripts.hub_data import RECASTS, hh_pair, hh_prompt, recast
from trl_ext.scripts.recipe.packaged import packaged_recipes
from trl_ext.scripts.recipe.strict_parser import load_recipe


START = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A cake?\n\nAssistant:"


def test_dialogues_are_split_before_their_last_turn():
    row = {"chosen": f"{START} Mix flour.", "rejected": f"{START} No."}
    assert hh_prompt(row) == {"prompt": START}
    assert hh_pair(row) == {"prompt": START, "chosen": " Mix flour.", "rejected": " No."}
    assert hh_pair({**row, "rejected": "\n\nHuman: Other\n\nAssistant: No."})["prompt"] == ""
    assert hh_prompt({"chosen": "no turn"}) == {"prompt": ""}


def test_rows_without_a_prompt_are_left_out(tmp_path):
    rows = [{"chosen": f"{START} a", "rejected": f"{START} b"}, {"chosen": "x", "rejected": "y"}]
    path = tmp_path / "data" / "pairs.json"
    assert recast(Dataset.from_list(rows), "hh-pairs", path) == 1
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"chosen": " a", "rejected": " b", "prompt": START}
    ]


def test_recipes_say_the_command_that_makes_their_data():
    for name, form in RECASTS.items():
        path = packaged_recipes()[form.wanted_by]
        files = load_recipe(path)["datasets"][0]["data_files"]
        assert f"trl-ext data {name} --output {files}" in path.read_text()


def test_a_file_is_not_written_over(tmp_path, capsys):
    (tmp_path / "x.json").touch()
    assert cli.main(["data", "hh-pairs", "--output", str(tmp_path / "x.json")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_completion_tokens():
    assert completion_tokens(completion_ids=[[1, 2, 3], []], completions=["a", ""]) == [3.0, 0.0]
