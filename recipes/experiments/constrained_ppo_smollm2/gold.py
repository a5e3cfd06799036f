"""The gold metric: positive in the eyes of a classifier that was not trained on, and ordinary text.

    gold = P(positive) * exp(-max(0, |surprisal - usual| - spread)) * share of word pairs that are no repetitions

with the mean surprisal of a completion's tokens under the base model, in nats, the logarithm of its perplexity, and
the mean and spread of that over the base model's own samples. The last factor is there because a small model finds one
word again and again as ordinary as any text: its perplexity does not see that.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch

from .sentiment import GOLD_FILE, words_of


def mean_surprisals(base_log_probs: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """Mean surprisal of the tokens of each response, in nats, from the base model's log-probabilities `(B, T)`."""
    return (-(base_log_probs * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).tolist()


def fluency(surprisals: Sequence[float] | np.ndarray, usual: float, spread: float) -> np.ndarray:
    """How ordinary texts of these surprisals are, in `(0, 1]`: 1 within `spread` of the `usual` one."""
    distances = np.abs(np.asarray(surprisals, dtype=np.float64) - usual)
    return np.exp(-np.maximum(0.0, distances - spread))


def distinct_pairs(completions: Sequence[str]) -> np.ndarray:
    """Share of the pairs of neighbouring words of each text that are no repetitions; 0 for fewer than two words."""
    found = []
    for completion in completions:
        pairs = list(itertools.pairwise(words_of(completion)))
        found.append(len(set(pairs)) / len(pairs) if pairs else 0.0)
    return np.array(found)


def gold(
    positive: Sequence[float] | np.ndarray,
    surprisals: Sequence[float] | np.ndarray,
    completions: Sequence[str],
    usual: float,
    spread: float,
) -> np.ndarray:
    """The gold metric of each completion, in `[0, 1]`."""
    ordinary = fluency(surprisals, usual, spread) * distinct_pairs(completions)
    return np.asarray(positive, dtype=np.float64) * ordinary


class Judge:
    """
    Judges completions by text and surprisal.

    Args:
        folder (`Path`):
            Folder of the experiment, with the classifier.
    """

    def __init__(self, folder: Path):
        self.classifier: Any = joblib.load(folder / GOLD_FILE)

    def positive(self, completions: Sequence[str]) -> np.ndarray:
        """Probability of positive sentiment of each completion."""
        return self.classifier.predict_proba(completions)[:, 1]
