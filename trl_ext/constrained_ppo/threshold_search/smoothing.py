"""Which of several noisy scores is believed to be the highest."""

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]


def smoothed_scores(points: Array, scores: Array, ages: Array, width: float, half_life: float) -> Array:
    """
    Scores averaged with those of their neighbours, for a single noisy score that is the highest of many is high by
    luck as much as by merit.

    ``sum_j w_ij y_j / sum_j w_ij``, with ``w_ij = exp(-|x_i - x_j|^2 / 2 width^2) 2^(-age_j / half_life)``; with a
    `width` of 0 only scores of the same point are averaged.

    Args:
        points (`Array` of shape `(M, K)`, float64):
            Where the scores were measured, in units of the search's box.
        scores (`Array` of shape `(M,)`, float64):
            Scores.
        ages (`Array` of shape `(M,)`, float64):
            How many measurements ago.
        width (`float`):
            Standard deviation of the kernel, in units of the box.
        half_life (`float`):
            Measurements after which a score counts half of a new one.

    Returns:
        `Array` of shape `(M,)`, float64.
    """
    squared = ((points[:, None] - points[None]) ** 2).sum(axis=-1)  # (M, M)
    near = np.exp(-squared / (2 * width**2)) if width else (squared == 0).astype(np.float64)
    # Ages from the newest, so that old scores alone don't vanish all together
    weights = near * 0.5 ** ((ages - ages.min()) / half_life)
    averaged: Array = weights @ scores / weights.sum(axis=1)
    return averaged
