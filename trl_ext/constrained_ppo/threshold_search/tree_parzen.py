"""Optuna's tree-structured Parzen estimator in the place of Nelder-Mead."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]


def require_optuna() -> Any:
    """The module `optuna`; an `ImportError` with the remedy where it is missing."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError('`search.sampler="tpe"` needs Optuna: pip install "trl-ext[search]".') from error
    return optuna


class TreeParzen:
    """
    Minimises a noisy function by Optuna's ask and tell, with the points of `first` before its own proposals.

    All that a proposal depends on is the seed and what was measured: Optuna's study is built anew for each, so that
    the state of a search is its measurements, and a resumed search asks for the same points.

    Args:
        first (`Array` of shape `(P, N)`, float64):
            Points that are measured first.
        lower (`Array` of shape `(N,)`, float64):
            Lower bounds.
        upper (`Array` of shape `(N,)`, float64):
            Upper bounds.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the proposals.
    """

    # There is no simplex, so nothing converges and no vertex is measured again
    at_iteration_start = False

    def __init__(self, first: Array, lower: Array, upper: Array, seed: int = 0):
        require_optuna()
        self.first, self.lower, self.upper, self.seed = np.clip(first, lower, upper), lower, upper, seed
        self.points: list[list[float]] = []
        self.values: list[float] = []
        self._point = self.first[0].copy()

    @property
    def best_point(self) -> Array:
        """The point of lowest value, `(N,)`; where none has one yet, the first."""
        return np.array(self.points[int(np.argmin(self.values))]) if self.points else self.first[0].copy()

    def ask(self) -> Array:
        """The point whose value is wanted, `(N,)`, float64; the same until [`tell`]."""
        return self._point.copy()

    def tell(self, value: float) -> None:
        """Takes the value of the point that [`ask`] gives."""
        self.points.append(self._point.tolist())
        self.values.append(float(value))
        self._point = self.first[len(self.points)].copy() if len(self.points) < len(self.first) else self._proposed()

    def _proposed(self) -> Array:
        optuna = require_optuna()
        distributions = {
            str(i): optuna.distributions.FloatDistribution(float(low), float(high))
            for i, (low, high) in enumerate(zip(self.lower, self.upper, strict=True))
        }
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would announce a new study each time
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                sampler = optuna.samplers.TPESampler(
                    multivariate=True, seed=self.seed + len(self.points), n_startup_trials=2 * len(self.first)
                )
                study = optuna.create_study(sampler=sampler)
            for point, value in zip(self.points, self.values, strict=True):
                params = {str(i): x for i, x in enumerate(point)}
                study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
            params = study.ask(distributions).params
        finally:
            optuna.logging.set_verbosity(verbosity)
        return np.array([params[name] for name in distributions])

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed search needs, of JSON's types."""
        return {
            "first": self.first.tolist(),
            "lower": self.lower.tolist(),
            "upper": self.upper.tolist(),
            "seed": self.seed,
            "points": self.points,
            "values": self.values,
            "point": self._point.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`]; a `KeyError` where a part of it is missing."""
        first, lower, upper, point = (
            np.array(state[name], dtype=float) for name in ("first", "lower", "upper", "point")
        )
        points, values, seed = [list(one) for one in state["points"]], list(state["values"]), int(state["seed"])
        self.first, self.lower, self.upper, self._point = first, lower, upper, point
        self.points, self.values, self.seed = points, values, seed
