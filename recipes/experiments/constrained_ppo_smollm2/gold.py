"""The gold metric: positive in the eyes of a classifier that was not trained on, and ordinary text for the base model.

    gold = P(positive) * exp(-max(0, |surprisal - usual| - spread))

with the median surprisal of a completion's tokens under the base model, in nats, and the mean and spread of that over
the base model's own samples. The mean surprisal, whose exponential is the perplexity, is fooled by one word again and
again: its first two tokens surprise as much as the others are predictable.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch

from .sentiment import GOLD_FILE


def median_surprisals(base_log_probs: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """
    Median surprisal of the tokens of each response, in nats, from the base model's log-probabilities `(B, T)`; 0 for
    an empty response.
    """
    rows = [row[own.bool()] for row, own in zip(-base_log_probs, mask, strict=True)]
    return [float(row.quantile(0.5)) if len(row) else 0.0 for row in rows]


def fluency(surprisals: Sequence[float], usual: float, spread: float) -> np.ndarray:
    """How ordinary texts of these surprisals are, in `(0, 1]`: 1 within `spread` of the `usual` one."""
    distances = np.abs(np.asarray(surprisals, dtype=np.float64) - usual)
    return np.exp(-np.maximum(0.0, distances - spread))


def gold(positive: Sequence[float], surprisals: Sequence[float], usual: float, spread: float) -> np.ndarray:
    """The gold metric of each completion, in `[0, 1]`."""
    return np.asarray(positive, dtype=np.float64) * fluency(surprisals, usual, spread)


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
