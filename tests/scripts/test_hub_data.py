"""Data of the Hub in the form that a recipe wants."""

import json
from math import log

from datasets import Dataset

from trl_ext import cli
from trl_ext.rewards import completion_tokens, distinct_words
from trl_ext.scripts.hub_data import RECASTS, hh_pair, hh_prompt, recast
from trl_ext.scripts.recipe.packaged import packaged_recipes
from trl_ext.scripts.recipe.strict_parser import load_recipe
from trl_ext.scripts.review_pairs import review_pairs, word_log_odds


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
        for path in map(packaged_recipes().get, form.wanted_by):
            files = load_recipe(path)["datasets"][0]["data_files"]
            assert f"trl-ext data {name} --output {files}" in path.read_text()


def review(opening, rest, label):
    return {"text": f"{opening}<br /><br />{' '.join([rest] * 21)}", "label": label}


REVIEWS = [
    review("This film is", "great", 1), review("This film is", "bad", 0), review("This film is", "dull", 0),
    review("I saw it", "twice", 1), review("I saw it", "once", 0), review("I saw it", "never", -1),
    review("Ann meets Bob", "and", 1), review("Ann meets Bob", "and", 0), review("What a mess", "awful", 0),
    review("What a mess", "lovely", 1), review("What a mess", "great", 1),
    {"text": "This film is bad", "label": 0},
]  # fmt: skip


def test_the_clearest_reviews_are_paired_by_their_first_words_whatever_their_order(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_ext.scripts.review_pairs.MIN_REVIEWS", 1)
    monkeypatch.setattr("trl_ext.scripts.review_pairs.NUM_PAIRS", 2)
    source, made = tmp_path / "reviews.jsonl", tmp_path / "pairs.jsonl"
    Dataset.from_list(REVIEWS).to_json(source)
    assert cli.main(["data", "imdb-pairs", "--output", str(made), "--data_files", str(source)]) == 0
    assert f"2 rows of {source} written" in capsys.readouterr().out
    rows = [json.loads(line) for line in made.read_text().splitlines()]

    # Twenty words without markup; "bad" and "great" are in two reviews each, "twice" and "once" in one
    def words(word):
        return " " + " ".join([word] * 20)

    assert sorted(rows, key=lambda row: row["prompt"]) == [
        {"prompt": "This film is", "chosen": words("great"), "rejected": words("bad")},
        {"prompt": "What a mess", "chosen": words("great"), "rejected": words("awful")},
    ]
    assert review_pairs(Dataset.from_list(REVIEWS[::-1])).to_list() == rows


def test_log_odds_of_words(monkeypatch):
    """3 positive and 2 negative reviews; a word counts once in a review, and is left out where it is in one only."""
    monkeypatch.setattr("trl_ext.scripts.review_pairs.MIN_REVIEWS", 2)
    texts = ["Good, good film.", "good", "film", "film bad", "don't", "good"]
    found = word_log_odds(texts, [1, 1, 1, 0, 0, -1])
    assert found == {"good": log(3 / 5) - log(1 / 4), "film": log(3 / 5) - log(2 / 4)}


def test_an_unknown_ending_is_refused(tmp_path, capsys):
    options = ["--output", str(tmp_path / "x.json"), "--data_files", "reviews.xls.gz"]
    assert cli.main(["data", "imdb-pairs", *options]) == 2
    assert "must end in one of .jsonl" in capsys.readouterr().err


def test_a_file_is_not_written_over(tmp_path, capsys):
    (tmp_path / "x.json").touch()
    assert cli.main(["data", "hh-pairs", "--output", str(tmp_path / "x.json")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_completion_tokens():
    assert completion_tokens(completion_ids=[[1, 2, 3], []], completions=["a", ""]) == [3.0, 0.0]


def test_distinct_words():
    message = [{"role": "assistant", "content": "Good, good film."}]
    assert distinct_words(completions=["a b c d", "", message], completion_ids=[]) == [1.0, 0.0, 2 / 3]
