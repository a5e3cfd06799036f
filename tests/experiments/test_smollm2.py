"""GRPO on review openings: the gold metric by hand, both classifiers, and what is observed of a run."""

import numpy as np
import pandas as pd
import pytest
import torch
from trl import GRPOConfig

from recipes.experiments.constrained_ppo_smollm2 import report
from recipes.experiments.constrained_ppo_smollm2.gold import Judge, distinct_pairs, fluency, gold, mean_surprisals
from recipes.experiments.constrained_ppo_smollm2.run import ObservedGRPOTrainer
from recipes.experiments.constrained_ppo_smollm2.sentiment import SentimentScore, distinct_share, halves, prepare
from tests.helpers.tiny import save_tiny_model, tiny_pairs


def reviews(number, seed):
    generator = np.random.default_rng(seed)
    words = {0: ["awful", "boring", "bad", "film"], 1: ["superb", "moving", "good", "film"]}
    labels = np.arange(number) % 2
    texts = [" ".join(generator.choice(words[label], size=40)) for label in labels]
    return pd.DataFrame({"text": texts, "label": labels})


def test_classifiers(tmp_path):
    for split, seed in (("train", 0), ("test", 1)):
        reviews(120, seed).to_parquet(tmp_path / f"imdb_{split}.parquet")
    own, others = halves(tmp_path)
    assert not set(own.index) & set(others.index) and own["label"].mean() == others["label"].mean() == 0.5
    assert prepare(tmp_path, tmp_path) == {"proxy": 1.0, "gold": 1.0, "agreement": 1.0}
    score, judge = SentimentScore(tmp_path), Judge(tmp_path)
    once, often, bad = score(["a superb film", "superb superb superb", "awful"])
    # Without bound: more of the same is better
    assert often > once > 0 > bad
    positive = judge.positive(["superb moving", "awful boring"])
    assert positive[0] > 0.5 > positive[1]


def test_distinct_share():
    assert distinct_share(["Good good film .", "a b c", " . "]) == [pytest.approx(2 / 3), 1.0, 0.0]


def test_gold_by_hand():
    """Usual surprisal 3 with a spread of 1: 3.5 is ordinary, 5 a nat too surprising, 0.5 a nat and a half too dull."""
    assert fluency([3.5, 5.0, 0.5], 3.0, 1.0) == pytest.approx([1.0, np.exp(-1.0), np.exp(-1.5)])
    texts = ["a b c", "good good good", "good film good film"]
    assert distinct_pairs([*texts, "one"]) == pytest.approx([1.0, 1 / 2, 2 / 3, 0.0])
    assert gold([0.5, 1.0, 1.0], [3.5, 5.0, 0.5], texts, 3.0, 1.0) == pytest.approx(
        [0.5, np.exp(-1.0) / 2, np.exp(-1.5) * 2 / 3]
    )
    log_probs = torch.tensor([[-1.0, -6.0, -2.0, -90.0], [-1.0, -1.0, -1.0, -1.0]])
    assert mean_surprisals(log_probs, torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])) == [3.0, 0.0]


def test_what_is_observed_is_what_was_trained_on(tmp_path):
    seen = []

    def recorded(completions, **columns):
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    args = GRPOConfig(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=4, num_generations=2, max_completion_length=4,
        max_steps=2, beta=1e-6, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = ObservedGRPOTrainer(
        save_tiny_model(tmp_path / "model"), recorded, args=args, train_dataset=tiny_pairs(8)
    )
    trainer.train()
    assert [row["step"] for row in trainer.observed] == [0] * 4 + [1] * 4
    assert sorted(row["completion"] for row in trainer.observed) == sorted(seen)
    assert all(row["surprisal"] > 0 for row in trainer.observed)


def test_report(tmp_path):
    """GRPO: gold 0.5, then 0.8, then 1 * exp(-2): text that the base model would not write."""

    def run(arm, seed, courses):
        observed = [
            {"step": step, "completion": "a b c", "surprisal": surprisal + noise, "positive": positive}
            for step, (surprisal, positive) in enumerate(np.repeat(courses, report.WINDOW, axis=0))
            for noise in (-1.0, 1.0)
        ]
        curve = [
            {"step": step + 1, "kl": float(step), "sentiment_score": 1.0, "distinct_share": 0.9}
            for step in range(3 * report.WINDOW)
        ]
        return {"arm": arm, "seed": seed, "observed": observed, "curve": curve, "cpu_seconds": 1.0}

    results = [run("GRPO", seed, [(3.0, 0.5), (3.0, 0.8), (7.0, 1.0)]) for seed in (0, 1)]
    assert report.usual_surprisal(results) == (3.0, 1.0)
    found = report.measured(results[0], 3.0, 1.0)
    # Two texts each: 6 and 8 nats, two and four nats beyond the spread
    assert found["gold"] == pytest.approx([0.5, 0.8, (np.exp(-2) + np.exp(-4)) / 2])
    assert found["kl"] == pytest.approx([1.5, 5.5, 9.5])
    row = report.write_report(results, tmp_path).splitlines()[2]
    assert row.startswith("| GRPO | 0.50 ± 0.00 | 0.80 ± 0.00 | 5.50 ± 0.00 | 0.08 ± 0.00 | 9.50 ± 0.00 |")
    assert (tmp_path / "gold.png").stat().st_size > 1000
