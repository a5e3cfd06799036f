"""Proxy points: rewards beyond which a gold metric falls (https://huggingface.co/papers/2310.04373, section 3)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import yaml
from scipy.spatial import Delaunay
from scipy.stats import gaussian_kde, spearmanr

from .surrogates import Predictor, Surrogate


# Points of the grid along each reward, by the number of rewards: at most 29,791 in all
_GRID_SIZES = {1: 501, 2: 101, 3: 31}
# Beyond three rewards a grid grows out of hand: so many random combinations of measured points in its place
_NUM_COMBINATIONS = 20_000
# Of the Dirichlet weights of a combination: below 1, they favour few of the points and come near the hull's edge
_CONCENTRATION = 0.5
# The number of facets of a convex hull grows with the power of half the dimension: beyond this the range stands in
_HULL_DIMENSIONS = 4
# A point this near to the edge of the data, as a share of its range, is at it
_EDGE = 0.02
# Rounding: of a spread that means none, of directions that span no volume, of a point on the hull's own faces
_NO_SPREAD, _NO_VOLUME, _ON_HULL = 1e-9, 1e-6, 1e-9
# Above the smallest float: a reward that is zero throughout has no spread either
_TINY = 1e-300


class NoJointSurface(ValueError):
    """The measurements can't tell a surface over several rewards; the curve of each still can be told."""


class DensityMask:
    """
    Where there are measurements enough to believe a surface: within the convex hull of the points `(M, K)` (their
    range, beyond four rewards) and where a Gaussian kernel density estimate is at least `relative_density` of its
    highest at a point, or `density` points for each unit of volume of the rewards (the paper's is 50 for two).
    """

    def __init__(self, points: np.ndarray, relative_density: float = 0.05, density: float | None = None):
        if not 0 <= relative_density < 1 or (density is not None and density < 0):
            raise ValueError(
                f"`relative_density` must lie in [0, 1) and `density` must not be negative, got {relative_density} "
                f"and {density}."
            )
        self.lowest, self.highest = points.min(axis=0), points.max(axis=0)
        scaled = (points - self.lowest) / (self.highest - self.lowest)
        if (
            len(points) <= points.shape[1]
            or np.linalg.matrix_rank(scaled - scaled.mean(axis=0), _NO_VOLUME) < scaled.shape[1]
        ):
            raise NoJointSurface(
                f"The {len(points)} points of {points.shape[1]} rewards lie on a line or plane, so no joint surface "
                "can be told from them. Add runs that maximise each reward on its own."
            )
        self._density = gaussian_kde(scaled.T)
        self._hull = Delaunay(scaled) if 1 < points.shape[1] <= _HULL_DIMENSIONS else None
        volume = float(np.prod(self.highest - self.lowest))
        at_points = self._density(scaled.T)
        self._least = relative_density * at_points.max() if density is None else density * volume / len(points)
        if not (at_points >= self._least).any():
            raise ValueError(
                f"`density={density}` is reached nowhere: the highest is {at_points.max() * len(points) / volume:.4g} "
                "points for each unit of volume. Lower it."
            )

    def __call__(self, at: np.ndarray) -> np.ndarray:
        """Whether each of the points `(P, K)` is inside, `(P,)`, bool."""
        inside: np.ndarray = np.all((at >= self.lowest) & (at <= self.highest), axis=1)
        scaled = (at - self.lowest) / (self.highest - self.lowest)
        if self._hull is not None:
            inside &= self._hull.find_simplex(scaled, tol=_ON_HULL) >= 0
        inside[inside] &= self._density(scaled[inside].T) >= self._least
        return inside

    def _around(self, points: np.ndarray) -> np.ndarray:
        """The points 2% of the range above, then below each point in each reward, `(P, 2K, K)`."""
        steps = _EDGE * np.diag(self.highest - self.lowest)
        around: np.ndarray = points[:, None] + np.concatenate([steps, -steps])
        return around

    def rising_beyond(self, point: np.ndarray, surface: Predictor) -> np.ndarray:
        """
        For each reward, 1 where a step up from the point `(K,)` leaves the mask while the surface rises, -1 where a
        step down does, 0 where none does; `(K,)`, int64. Only the sign of the slope at the edge is used, no value
        beyond it.
        """
        around = self._around(point[None])[0]
        up, down = np.split(np.logical_not(self(around)), 2)
        slopes = np.subtract(*np.split(surface(around), 2))
        return np.where(up & (slopes > 0), 1, np.where(down & (slopes < 0), -1, 0))

    def at_edge(self, points: np.ndarray) -> np.ndarray:
        """Whether a step of 2% of the range leaves the mask, so that the true peak may lie beyond; `(P,)`, bool."""
        around = self._around(points)
        inside = self(around.reshape(-1, points.shape[1])).reshape(len(points), -1)
        return np.logical_not(np.all(inside, axis=1))


@dataclass(frozen=True)
class Peak:
    """The highest point of a fitted surface within the data."""

    point: np.ndarray  # (K,), rewards at the peak
    gold: float  # Fitted gold metric there
    interval: np.ndarray  # (2, K), lowest and highest rewards of the bootstrap interval of the peak
    at_edge: bool  # Whether the peak lies at the edge of the data
    rising: np.ndarray  # (K,), 1 or -1 where the surface still rises beyond the data with more or less of a reward
    edge_share: float  # Share of the resamples whose peak does
    num_resamples: int  # Those that a surface could be fitted to
    candidates: np.ndarray  # (P, K), points at which the surface was looked at
    fitted: np.ndarray  # (P,), its values there, NaN outside the mask
    band: np.ndarray  # (2, P), bootstrap interval of the values, NaN outside the mask


def find_peak(
    points: np.ndarray,
    gold: np.ndarray,
    run: np.ndarray,
    surrogate: Surrogate,
    mask: DensityMask,
    num_resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> Peak:
    """
    Fits a surface to the gold metric over points `(M, K)` and finds its peak within the mask, with a bootstrap
    interval. A resample draws runs with replacement, then points of each drawn run with replacement; the mask stays,
    and resamples with too few distinct points for the surface are left out.
    """
    if not 0 < confidence < 1 or num_resamples < 0:
        raise ValueError(
            f"`confidence` must lie in (0, 1) and `num_resamples` must not be negative, got {confidence} and "
            f"{num_resamples}."
        )
    generator = np.random.default_rng(seed)
    candidates = _candidate_points(points, generator)
    inside = mask(candidates)
    allowed = candidates[inside]
    surface = surrogate.fit(points, gold)
    fitted = surface(allowed)
    best = int(np.argmax(fitted))
    repeated = surrogate.for_resamples(points, gold)
    resampled = []
    for _ in range(num_resamples):
        rows = resample(run, generator)
        try:
            resampled.append(repeated.fit(points[rows], gold[rows])(allowed))
        except ValueError:
            continue
    levels = [50 * (1 - confidence), 50 * (1 + confidence)]
    surfaces = np.array(resampled) if resampled else np.full((1, len(allowed)), np.nan)
    peaks = allowed[surfaces.argmax(axis=1)] if resampled else np.full((1, points.shape[1]), np.nan)
    everywhere, band = np.full(len(candidates), np.nan), np.full((2, len(candidates)), np.nan)
    everywhere[inside], band[:, inside] = fitted, np.percentile(surfaces, levels, axis=0)
    return Peak(
        point=allowed[best],
        gold=float(fitted[best]),
        interval=np.percentile(peaks, levels, axis=0),
        at_edge=bool(mask.at_edge(allowed[[best]])[0]),
        rising=mask.rising_beyond(allowed[best], surface),
        edge_share=float(mask.at_edge(peaks).mean()) if resampled else math.nan,
        num_resamples=len(resampled),
        candidates=candidates,
        fitted=everywhere,
        band=band,
    )


def _candidate_points(points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Where a surface is looked at, `(P, K)`: a grid for up to three rewards, else points and combinations of them."""
    num_rewards = points.shape[1]
    if num_rewards in _GRID_SIZES:
        axes = np.linspace(points.min(axis=0), points.max(axis=0), _GRID_SIZES[num_rewards]).T
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, num_rewards)
    chosen = generator.integers(len(points), size=(_NUM_COMBINATIONS, num_rewards + 1))
    weights = generator.dirichlet(np.full(num_rewards + 1, _CONCENTRATION), size=_NUM_COMBINATIONS)
    return np.vstack([points, np.einsum("pc,pck->pk", weights, points[chosen])])


def resample(run: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Rows of one bootstrap resample; as many as there are points only on average, for runs differ in length."""
    runs = np.unique(run)
    drawn = generator.choice(runs, size=len(runs))
    return np.concatenate([generator.choice(rows := np.flatnonzero(run == one), size=len(rows)) for one in drawn])


def check_variation(names: Sequence[str], points: np.ndarray) -> None:
    """Refuses rewards that do not vary over the points `(M, K)`."""
    spread, size = np.ptp(points, axis=0), np.abs(points).max(axis=0)
    constant = [name for name, s, m in zip(names, spread, size, strict=True) if s <= _NO_SPREAD * max(m, _TINY)]
    if constant:
        raise ValueError(
            f"The rewards {constant} do not vary over the {len(points)} evaluations. Use runs in which they are "
            "trained, or leave them out with `rewards`."
        )


def check_joint(names: Sequence[str]) -> None:
    """Refuses a joint surface of one reward."""
    if len(names) < 2:
        raise NoJointSurface(f"A joint surface takes at least two rewards, and the runs have {list(names)}.")


def correlations(names: Sequence[str], points: np.ndarray) -> dict[tuple[str, str], tuple[float, float]]:
    """Pearson's and Spearman's coefficients of each pair of rewards over the points `(M, K)`, by its names."""
    pairs = itertools.combinations(range(len(names)), 2)
    return {
        (names[i], names[j]): (
            float(np.corrcoef(points[:, i], points[:, j])[0, 1]),
            float(spearmanr(points[:, i], points[:, j]).statistic),
        )
        for i, j in pairs
    }


def constraints_block(
    names: Sequence[str], thresholds: Sequence[float], kind: str | None = None, comments: Sequence[str] = ()
) -> str:
    """The `constraints:` block of a recipe, with comments above it; `kind` left out, a preset of `method` gives it."""
    entries = [
        {"reward": name, "threshold": float(f"{threshold:.4g}"), **({"kind": kind} if kind else {})}
        for name, threshold in zip(names, thresholds, strict=True)
    ]
    lines = [f"# {line}" for comment in comments for line in comment.splitlines()]
    return "\n".join([*lines, yaml.safe_dump({"constraints": entries}, sort_keys=False)])
