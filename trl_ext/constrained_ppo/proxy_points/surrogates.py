"""Surfaces that are fitted to a gold metric over rewards."""

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


Predictor = Callable[[np.ndarray], np.ndarray]
# Bounds of the kernel's parameters, in units of the spread of rewards and gold metric. A length below a fifth follows
# the noise between neighbours, one of a hundred is a plane; noise reaches from practically none to ten times all else
LENGTHS, VARIANCES, NOISES = (0.2, 100.0), (1e-2, 1e3), (1e-6, 10.0)


class Surrogate(Protocol):
    """A family of surfaces that is fitted to measurements."""

    def fit(self, points: np.ndarray, values: np.ndarray) -> Predictor:
        """The fitted surface: a function from points `(P, K)` to values `(P,)`, for points `(M, K)`, values `(M,)`."""
        ...

    def for_resamples(self, points: np.ndarray, values: np.ndarray) -> "Surrogate":
        """The family as it is fitted to resamples of measurements."""
        ...


@dataclass(frozen=True)
class Polynomial:
    """Polynomials of all rewards together, fitted by least squares; the paper's total degree is 10."""

    degree: int = 3

    def __post_init__(self) -> None:
        if self.degree < 2:
            raise ValueError(f"`degree` must be at least 2 to have a peak, got {self.degree}.")

    def num_coefficients(self, num_rewards: int) -> int:
        """Number of coefficients for a number of rewards."""
        return math.comb(self.degree + num_rewards, num_rewards)

    def fit(self, points: np.ndarray, values: np.ndarray) -> Predictor:
        """The least-squares polynomial; refuses fewer distinct points than it has coefficients."""
        needed, given = self.num_coefficients(points.shape[1]), len(np.unique(points, axis=0))
        if given < needed:
            raise ValueError(
                f"`degree={self.degree}` has {needed} coefficients for {points.shape[1]} rewards, and there are "
                f"{given} distinct points. Lower the degree, evaluate more often, or use more runs."
            )
        centre, scale = points.mean(axis=0), np.abs(points - points.mean(axis=0)).max(axis=0)
        scale = np.where(scale > 0, scale, 1.0)
        powers = [
            power for power in itertools.product(range(self.degree + 1), repeat=points.shape[1])
            if sum(power) <= self.degree
        ]  # fmt: skip

        def design(at: np.ndarray) -> np.ndarray:
            # Legendre polynomials of the scaled rewards: well conditioned at the paper's degree
            table = np.polynomial.legendre.legvander((at - centre) / scale, self.degree)
            return np.stack(
                [np.prod([table[:, axis, power[axis]] for axis in range(len(power))], axis=0) for power in powers],
                axis=1,
            )

        coefficients = np.linalg.lstsq(design(points), values, rcond=None)[0]
        return lambda at: design(at) @ coefficients

    def for_resamples(self, points: np.ndarray, values: np.ndarray) -> "Polynomial":
        """The same family."""
        return self


@dataclass(frozen=True)
class GaussianProcess:
    """
    Gaussian processes with a squared-exponential kernel, one length for each reward, and noise. The kernel is fitted
    by maximum likelihood, where none is given to keep.
    """

    kernel: Any = None

    def fit(self, points: np.ndarray, values: np.ndarray) -> Predictor:
        """The posterior mean."""
        centre, scale = points.mean(axis=0), points.std(axis=0)
        scale = np.where(scale > 0, scale, 1.0)
        process = self._fitted((points - centre) / scale, values)
        return lambda at: process.predict((at - centre) / scale)

    def for_resamples(self, points: np.ndarray, values: np.ndarray) -> "GaussianProcess":
        """The process with the kernel of all measurements, so that resamples differ by their points alone."""
        scaled = (points - points.mean(axis=0)) / points.std(axis=0)
        return GaussianProcess(self._fitted(scaled, values).kernel_)

    def _fitted(self, scaled: np.ndarray, values: np.ndarray) -> Any:
        try:
            from sklearn.exceptions import ConvergenceWarning
            from sklearn.gaussian_process import GaussianProcessRegressor
            from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
        except ImportError as error:
            raise ImportError(
                '`surrogate=gaussian-process` needs scikit-learn: pip install "trl-ext[proxy-points]".'
            ) from error
        kernel, optimizer = self.kernel, None
        if kernel is None:
            optimizer = "fmin_l_bfgs_b"
            lengths = RBF(np.ones(scaled.shape[1]), LENGTHS)
            kernel = ConstantKernel(1.0, VARIANCES) * lengths + WhiteKernel(0.1, NOISES)
        process = GaussianProcessRegressor(kernel, optimizer=optimizer, normalize_y=True, random_state=0)
        with warnings.catch_warnings():
            # A parameter at its bound, such as no noise, is a result
            warnings.simplefilter("ignore", ConvergenceWarning)
            return process.fit(scaled, values)
