"""Pairs sampled from a policy: best and worst of what has ended, by a function or a reward model."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.helpers.tiny import FAMILIES, WORDS, save_tiny_model, tiny_tokenizer
from trl_ext import cli
from trl_ext.scripts import sample_pairs


class Scripted:
    """A policy whose completions are known."""

    def __init__(self, completions):
        self.completions = completions

    def sample(self, prompts, num_samples):
        return [self.completions[prompt if isinstance(prompt, str) else prompt[-1]["content"]] for prompt in prompts]


def options_of(**changes):
    given = {"num_samples": 3, "batch_size": 2, **changes}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return sample_pairs.make_parser().parse_args(["--model", "m", "--reward", "r", *words])


def scored(prompts, completions, bonus, **columns):
    """The number that a completion ends with, and the row's own."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [float(text.split()[-1]) + extra for text, extra in zip(texts, bonus, strict=True)]


def test_best_and_worst_by_hand():
    rows = [{"prompt": prompt, "bonus": 10.0 * index} for index, prompt in enumerate("abcd")]
    policy = Scripted({
        "a": ["x 1", "x 3", "x 2"], "b": ["y 5", "y 5", "y 5"], "c": [None, "z 4", None], "d": ["w 0", None, "w 2"],
    })  # fmt: skip
    pairs, summary = sample_pairs.sample_pairs(rows, policy, scored, options_of())
    assert pairs == [
        {"prompt": "a", "chosen": "x 3", "rejected": "x 1"}, {"prompt": "d", "chosen": "w 2", "rejected": "w 0"},
    ]  # fmt: skip
    assert (summary["pairs"], summary["unfinished"], summary["too_close"], summary["samples"]) == (2, 3, 2, 12)
    assert (summary["chosen_reward"], summary["rejected_reward"]) == (17.5, 15.5)
    # The gap has to be more than the least one
    pairs, _ = sample_pairs.sample_pairs(rows[:1], policy, scored, options_of(min_gap=1.9))
    assert len(pairs) == 1
    with pytest.raises(ValueError, match=r"No prompt of 1 .* more than 2\.0 \(0 of 3 completions did not end\)"):
        sample_pairs.sample_pairs(rows[:1], policy, scored, options_of(min_gap=2))


def test_messages_stay_messages():
    prompt = [{"role": "user", "content": "a"}]
    pairs, _ = sample_pairs.sample_pairs(
        [{"prompt": prompt, "bonus": 0.0}], Scripted({"a": ["x 1", "x 3", None]}), scored, options_of()
    )
    assert pairs == [{
        "prompt": prompt, "chosen": [{"role": "assistant", "content": "x 3"}],
        "rejected": [{"role": "assistant", "content": "x 1"}],
    }]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **FAMILIES["llama"], vocab_size=len(WORDS), num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    tiny_tokenizer().save_pretrained(folder / "reward")
    return save_tiny_model(folder / "policy"), str(folder / "reward")


@pytest.mark.parametrize("messages", [False, True])
def test_the_command_with_a_reward_model(models, messages, tmp_path, capsys):
    policy, reward = models
    texts = ["the film", "a book was very"]
    prompts = [[{"role": "user", "content": text}] for text in texts] if messages else texts
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    words = ["--model", policy, "--reward", reward, "--data_files", str(tmp_path / "prompts.jsonl"), "--num_samples",
             "32", "--max_completion_length", "24", "--output_dir", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(["sample-pairs", *words]) == 0
    assert "2 pairs of 2 prompts written" in capsys.readouterr().out
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [pair["prompt"] for pair in pairs] == prompts and summary["chosen_reward"] > summary["rejected_reward"]
    assert 0 < summary["unfinished"] < 64  # tokens are about uniform, so most end, and some do not
    # What was written has the rewards that are said, each text scored alone
    model = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    tokenizer = tiny_tokenizer()

    def alone(prompt, completion):
        text = tokenizer.apply_chat_template(prompt + completion, tokenize=False) if messages else prompt + completion
        return model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits.item()

    means = [sum(alone(pair["prompt"], pair[side]) for pair in pairs) / 2 for side in ("chosen", "rejected")]
    assert means == pytest.approx([summary["chosen_reward"], summary["rejected_reward"]], abs=1e-5)
    # The same seed draws the same
    first = (tmp_path / "out" / "pairs.jsonl").read_text()
    assert sample_pairs.main(words) == 0 and (tmp_path / "out" / "pairs.jsonl").read_text() == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_samples", "1", "--dataset_name", "playground"], r"`--num_samples 1` must be at least 2"),
        (["--temperature", "0", "--dataset_name", "playground"], r"`--temperature 0.0` must be greater than 0"),
        (["--temperature", "nan", "--dataset_name", "playground"], r"`--temperature nan`"),
        ([], r"one of `--dataset_name` and `--data_files`"),
        (["--dataset_name", "playground", "--dataset_train_split", "trian"], r"`dataset_train_split: trian`"),
        (["--data_files", "rows.jsonl"], r"columns \['text'\], and no `prompt`"),
    ],
)
def test_wrong_options(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    reward = ["--reward", "trl_ext.playground.sentiment_reward"]
    assert cli.main(["sample-pairs", "--model", "m", *reward, *words]) == 2
    assert re.search(message, capsys.readouterr().err)
