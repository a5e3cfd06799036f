"""The experiment on frozen features of a sentence encoder, at a size that takes seconds."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModel

from recipes.experiments.equilibrium_minilm import run as minilm
from recipes.experiments.equilibrium_minilm.run import HEADS, MiniLMArguments, at_best_rate, difference, features, main
from tests.helpers.tiny import WORDS, tiny_tokenizer


def arguments(tmp_path, **settings):
    return MiniLMArguments(
        **{
            "model_name_or_path": str(tmp_path / "encoder"), "imdb_dir": str(tmp_path),
            "hh_file": str(tmp_path / "pairs.jsonl"), "learning_rates": [0.001, 0.01], "seeds": [0, 1], "max_steps": 3,
            "batch_size": 4, "width": 4, "depths": [2, 3], "max_length": 16, "num_train": 12, "num_validation": 6,
            "num_test": 8, "output_dir": str(tmp_path / "out"), **settings,
        }
    )  # fmt: skip


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS[3:], size=generator.integers(3, 20))) for _ in range(30)]
    for name in ("train", "test"):
        frame = pd.DataFrame({"text": texts, "label": [i % 2 for i in range(len(texts))]})
        frame.to_parquet(tmp_path / f"imdb_{name}.parquet")
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
            file.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=len(WORDS), **sizes)).save_pretrained(
        tmp_path / "encoder"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    return tmp_path


def test_every_head_of_every_depth_is_run_once(data):
    main(arguments(data))
    kept = (data / "out" / "runs.jsonl").read_text()
    rows = [json.loads(line) for line in kept.splitlines()]
    assert len(rows) == 2 * 2 * 2 * (1 + 4 * 2)  # tasks, rates, seeds; the linear head has no depth
    assert {len(row["right"]) for row in rows} == {8, 4}
    results = (data / "out" / "results.md").read_text()
    assert results.count("| linear | - |") == 2 and results.count("| EP, 90 degrees, homeostasis | 3 |") == 2
    assert (data / "out" / "results.png").stat().st_size > 1000
    symmetric = at_best_rate(rows, task="hh", head="EP", depth=2)
    assert [row["seed"] for row in symmetric] == [0, 1] and all(row["weight_angle"] < 0.1 for row in symmetric)
    perceptron = at_best_rate(rows, task="hh", head="perceptron", depth=2)
    assert perceptron[0]["parameters"] == symmetric[0]["parameters"]  # feedback through the same weights
    main(arguments(data))  # Nothing is run again
    assert (data / "out" / "runs.jsonl").read_text() == kept
    with pytest.raises(ValueError, match="`heads` has .*'mlp'"):
        arguments(data, heads=["mlp"])


def test_features_are_those_of_each_text_alone(data):
    """Padding leaves no trace, splits don't overlap, and both texts of a pair stay together."""
    args = arguments(data)
    for task in minilm.TASKS:
        texts = minilm.read_texts(args, task)
        found = features(args, task)
        kept = torch.load(data / "out" / f"{task}_features.pt", weights_only=True)
        for split, (rows, labels) in texts.items():
            alone = torch.cat([minilm.embed(args, [text], from_end=task == "hh") for text in rows])
            torch.testing.assert_close(kept[split][0], alone, rtol=1e-4, atol=1e-5)
            assert torch.equal(labels, kept[split][1]) and len(labels) == (len(rows) if task == "imdb" else 0)
        torch.testing.assert_close(found["train"][0].mean(dim=0), torch.zeros(8), rtol=0, atol=1e-5)
        torch.testing.assert_close(found["train"][0].std(dim=0), torch.ones(8), rtol=1e-4, atol=1e-4)
    assert not set(texts["train"][0]) & set(texts["test"][0])
    pairs = pd.read_json(data / "pairs.jsonl", lines=True)
    assert set(zip(texts["test"][0][::2], texts["test"][0][1::2], strict=True)) <= set(
        zip(pairs["chosen"], pairs["rejected"], strict=True)
    )


def test_difference_of_two_heads_by_hand():
    """Three answers in four more are right, in every seed: the interval is that of four answers."""
    rows = [{"right": "1111"}, {"right": "1111"}]
    mean, low, high = difference(rows, [{"right": "0001"}, {"right": "0001"}])
    assert mean == 0.75 and low == pytest.approx(0.25) and high == 1.0
    assert difference(rows, rows) == (0.0, 0.0, 0.0)


def test_rates_are_chosen_on_validation_data():
    rows = [
        {
            "head": "EP",
            "seed": seed,
            "learning_rate": rate,
            "validation_accuracy": accuracy,
            "test_accuracy": -accuracy,
        }
        for seed in (1, 0)
        for rate, accuracy in ((0.1, 0.6), (0.2, 0.7))
    ]
    assert [(row["seed"], row["learning_rate"]) for row in at_best_rate(rows, head="EP")] == [(0, 0.2), (1, 0.2)]
    assert at_best_rate(rows, head="linear") == [] and set(HEADS) >= {"EP", "linear"}
