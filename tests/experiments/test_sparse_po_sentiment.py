"""The experiment behind docs/results/sparse_po_sentiment.md, at a size that takes seconds."""

import json

import numpy as np
import pandas as pd

from recipes.experiments.sparse_po_sentiment import run as sentiment
from tests.helpers.tiny import WORDS, save_tiny_model


def test_two_methods(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    labels = [index % 2 for index in range(80)]
    texts = [" ".join([*generator.choice(WORDS[3:], size=20), *["good" if label else "bad"] * 5]) for label in labels]
    for split in ("train", "test", "unsup"):
        pd.DataFrame({"text": texts, "label": labels}).to_parquet(tmp_path / f"imdb_{split}.parquet")
    monkeypatch.setattr(sentiment, "METHODS", {name: sentiment.METHODS[name] for name in ("DPO", "SparsePO common")})
    out = tmp_path / "out"
    arguments = [
        "--imdb_dir", str(tmp_path), "--model_name_or_path", save_tiny_model(tmp_path / "model"), "--betas", "0.1",
        "--seeds", "0", "--tuning_steps", "2", "--num_pairs", "16", "--num_prompts", "8", "--new_tokens", "6",
        "--prompt_words", "3", "--max_steps", "1", "--per_device_train_batch_size", "4",
        "--mask_learning_rate", "0.01", "--use_cpu", "True", "--bf16", "False", "--report_to", "none",
        "--save_strategy", "no", "--logging_steps", "1", "--output_dir", str(out),
    ]  # fmt: skip
    sentiment.main(*sentiment.make_parser().parse_args_and_config(arguments))
    kept = (out / "runs.jsonl").read_text()
    runs = [json.loads(line) for line in kept.splitlines()]
    assert [run["method"] for run in runs] == ["DPO", "SparsePO common"]
    assert json.loads((out / "facts.json").read_text())["classifier_accuracy"] > 0.9
    table = (out / "sentiment_frontier.md").read_text()
    for run in runs:
        assert 0 < run["reward"] < 1 and run["divergence"] >= 0
        assert f"| {run['method']} | 0.1 | {run['reward']:.3f} ± 0.000 |" in table
    assert (out / "sentiment_frontier.png").stat().st_size > 1000
    sentiment.main(*sentiment.make_parser().parse_args_and_config(arguments))  # Nothing is run again
    assert (out / "runs.jsonl").read_text() == kept
