"""The experiment on a sentence encoder, at a size that takes seconds."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModel

from recipes.experiments.equilibrium_minilm import run as minilm
from recipes.experiments.equilibrium_minilm.encoder import Encoder, mean_state, read_texts
from recipes.experiments.equilibrium_minilm.report import at_best_setting, difference
from tests.helpers.tiny import WORDS, tiny_tokenizer
from trl_ext.equilibrium import EPHead


def arguments(tmp_path, **settings):
    return minilm.MiniLMArguments(
        **{
            "model_name_or_path": str(tmp_path / "encoder"), "imdb_dir": str(tmp_path),
            "hh_file": str(tmp_path / "pairs.jsonl"), "learning_rates": [0.001], "seeds": [0], "max_steps": 2,
            "heads": ["linear", "perceptron", "EP", "EP, 90 degrees, homeostasis"],
            "batch_size": 4, "width": 4, "max_length": 16, "num_train": 12, "num_validation": 6, "num_test": 8,
            "trained_max_steps": 2, "trained_batch_size": 4, "trained_max_length": 8, "trained_num_train": 6,
            "trained_num_test": 4, "output_dir": str(tmp_path / "out"), **settings,
        }
    )  # fmt: skip


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS[3:], size=generator.integers(3, 20))) for _ in range(30)]
    for name in ("train", "test"):
        frame = pd.DataFrame({"text": texts, "label": np.arange(len(texts), dtype=np.int8) % 2})
        frame.to_parquet(tmp_path / f"imdb_{name}.parquet")
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
            file.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=len(WORDS), **sizes)).save_pretrained(
        tmp_path / "encoder"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    return tmp_path


def test_every_head_is_run_once_frozen_and_trained(data):
    minilm.main(arguments(data))
    minilm.main(arguments(data, depths=[3], input_norms=["standardize"], backbones=["frozen"]))
    kept = (data / "out" / "runs.jsonl").read_text()
    rows = [json.loads(line) for line in kept.splitlines()]
    frozen, trained = ([row for row in rows if row["backbone"] == name] for name in minilm.BACKBONES)
    assert len(frozen) == 2 * (2 * 4 + 3)  # tasks; inputs and heads, and the deeper ones
    assert {len(row["right"]) for row in frozen} == {8, 4} and all("validation_accuracy" in row for row in frozen)
    assert len(trained) == 2 * 4 and {len(row["right"]) for row in trained} == {4, 2}
    symmetric = at_best_setting(rows, task="hh", backbone="frozen", head="EP", depth=2)
    assert symmetric[0]["weight_angle"] < 0.1
    own = at_best_setting(trained, task="hh", head="EP")  # at the setting chosen on frozen features
    assert (own[0]["learning_rate"], own[0]["input_norm"]) == (
        symmetric[0]["learning_rate"], symmetric[0]["input_norm"]
    )  # fmt: skip
    perceptron = at_best_setting(rows, task="hh", backbone="frozen", head="perceptron", depth=2)
    assert perceptron[0]["parameters"] == symmetric[0]["parameters"]  # feedback through the same weights
    results = (data / "out" / "results.md").read_text()
    assert results.count("| linear | - |") == 6 and results.count("| EP, 90 degrees, homeostasis | 3 |") == 4
    assert (data / "out" / "results.png").stat().st_size > 1000
    minilm.main(arguments(data))  # Nothing is run again
    assert (data / "out" / "runs.jsonl").read_text() == kept
    with pytest.raises(ValueError, match="`heads` has .*'mlp'"):
        arguments(data, heads=["mlp"])
    with pytest.raises(ValueError, match="`num_test` is 7"):
        arguments(data, num_test=7)


def test_features_are_those_of_each_text_alone(data):
    """Padding leaves no trace, splits don't overlap, pairs stay together, and the last layer is the last."""
    for task in ("imdb", "hh"):
        texts = read_texts(task, str(data), str(data / "pairs.jsonl"), (12, 6, 8))
        encoder = Encoder(str(data / "encoder"), 16, from_end=task == "hh")
        for split, size in zip(texts.values(), (12, 6, 8), strict=True):
            assert len(split.texts) == size and len(split.labels) == (size if task == "imdb" else 0)
            found = encoder.features(split.texts)
            alone = torch.cat([encoder.features([text]) for text in split.texts])
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
            states, mask = encoder.states_before_last_layer(split.texts)
            with torch.no_grad():
                above = mean_state(encoder.last_layer().eval(), states, mask)
            torch.testing.assert_close(above, alone, rtol=1e-4, atol=1e-5)
    assert not set(texts["train"].texts) & set(texts["test"].texts)
    pairs = pd.read_json(data / "pairs.jsonl", lines=True)
    test = texts["test"].texts
    assert set(zip(test[::2], test[1::2], strict=True)) <= set(zip(pairs["chosen"], pairs["rejected"], strict=True))
    with pytest.raises(ValueError, match="has 15 pairs, the splits need 16"):
        read_texts("hh", str(data), str(data / "pairs.jsonl"), (14, 10, 8))


def test_input_is_normalised_alike_for_all_heads(data):
    """Before a linear map, as in the equilibrium head: the first batch of training sets mean and deviation."""
    setting = {"depth": 0, "input_norm": "standardize"}
    rows = torch.randn(6, 5) * 3 + 7
    args = arguments(data)
    linear = minilm.build_head(args, setting | {"head": "linear"}, 5, 1)
    head = minilm.build_head(args, setting | {"head": "EP", "depth": 1}, 5, 1)
    assert isinstance(head, EPHead)
    linear(rows), head(rows)
    other = torch.randn(4, 5)
    expected = (other - rows.mean(dim=0)) / (rows.var(dim=0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(linear.eval()[0](other), expected)
    torch.testing.assert_close(head.eval()._normalized(other, updates=False), expected)
    assert len(minilm.build_head(args, {"depth": 0, "input_norm": "none", "head": "linear"}, 5, 1)) == 1


def test_difference_of_two_heads_by_hand():
    """Three answers in four more are right, in every seed: the interval is that of four answers."""
    rows = [{"right": "1111"}, {"right": "1111"}]
    mean, low, high = difference(rows, [{"right": "0001"}, {"right": "0001"}])
    assert mean == 0.75 and low == pytest.approx(0.25) and high == 1.0
    assert difference(rows, rows) == (0.0, 0.0, 0.0)


def test_settings_are_chosen_on_validation_data():
    rows = [
        {"head": "EP", "seed": seed, "learning_rate": rate, "input_norm": norm, "validation_accuracy": accuracy}
        for seed in (1, 0)
        for rate, norm, accuracy in ((0.1, "none", 0.6), (0.2, "none", 0.5), (0.2, "standardize", 0.7))
    ]
    best = at_best_setting(rows, head="EP")
    assert [(row["seed"], row["learning_rate"], row["input_norm"]) for row in best] == [
        (0, 0.2, "standardize"), (1, 0.2, "standardize")
    ]  # fmt: skip
    assert at_best_setting(rows, head="EP", input_norm="none")[0]["learning_rate"] == 0.1
    assert math.isclose(sum(row["validation_accuracy"] for row in best), 1.4)
