"""Nelder-Mead as an ask-and-tell optimizer, for an objective that is a training run and can't be called."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]


class NelderMead:
    """
    Minimises a function whose values are handed in one by one.

    [`ask`] gives the next point, [`tell`] takes its value. The rules are those of
    `scipy.optimize.minimize(method="Nelder-Mead")`: reflection, expansion, outside and inside contraction, shrinking,
    and points outside the box clipped onto it. The sequence of points is the same too.

    Args:
        simplex (`Sequence[Sequence[float]]` of shape `(N+1, N)`):
            Starting vertices. A coordinate above the box is mirrored at its upper bound, then clipped.
        lower (`Sequence[float]` of shape `(N,)`, *optional*):
            Lower bounds.
        upper (`Sequence[float]` of shape `(N,)`, *optional*):
            Upper bounds.
        reflection (`float`, *optional*, defaults to `1.0`):
            Coefficient of reflection, positive.
        expansion (`float`, *optional*, defaults to `2.0`):
            Coefficient of expansion, above 1.
        contraction (`float`, *optional*, defaults to `0.5`):
            Coefficient of both contractions, in `(0, 1)`.
        shrinkage (`float`, *optional*, defaults to `0.5`):
            Coefficient of shrinking, in `(0, 1)`.

    Raises:
        ValueError: If the simplex has another shape, is flat or not finite, or a bound or coefficient is out of range.

    Example:

    ```python
    from trl_ext.constrained_ppo.threshold_search.nelder_mead import NelderMead

    optimizer = NelderMead([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    for _ in range(60):
        x, y = optimizer.ask()
        optimizer.tell((x - 0.3) ** 2 + (y + 0.2) ** 2)
    print(optimizer.best_point, optimizer.best_value)
    ```
    """

    def __init__(
        self,
        simplex: Sequence[Sequence[float]] | Array,
        lower: Sequence[float] | Array | None = None,
        upper: Sequence[float] | Array | None = None,
        reflection: float = 1.0,
        expansion: float = 2.0,
        contraction: float = 0.5,
        shrinkage: float = 0.5,
    ):
        self.simplex = np.array(simplex, dtype=np.float64)
        if self.simplex.ndim != 2 or self.simplex.shape[0] != self.simplex.shape[1] + 1:
            raise ValueError(f"`simplex` must have the shape (N+1, N), got {self.simplex.shape}.")
        dimensions = self.simplex.shape[1]
        self.lower = np.full(dimensions, -np.inf) if lower is None else np.array(lower, dtype=np.float64)
        self.upper = np.full(dimensions, np.inf) if upper is None else np.array(upper, dtype=np.float64)
        self.reflection, self.expansion = reflection, expansion
        self.contraction, self.shrinkage = contraction, shrinkage
        self._check_settings()
        mirrored = np.where(self.simplex > self.upper, 2 * self.upper - self.simplex, self.simplex)
        self.simplex = self._boxed(mirrored)
        if np.linalg.matrix_rank(self.simplex[1:] - self.simplex[0]) < dimensions:
            raise ValueError(
                f"`simplex` spans no volume within the bounds: {self.simplex.tolist()}. Spread its vertices, or widen "
                "the bounds."
            )
        self.values = np.full(dimensions + 1, np.inf)
        self._stage, self._index = "initial", 0
        self._point = self.simplex[0].copy()
        self._reflected, self._reflected_value = self._point, np.inf

    def _check_settings(self) -> None:
        shape = self.simplex.shape[1:]
        if self.lower.shape != shape or self.upper.shape != shape or not (self.lower < self.upper).all():
            raise ValueError(
                f"`lower` must lie below `upper`, with one bound for each of the {shape[0]} coordinates, got "
                f"{self.lower.tolist()} and {self.upper.tolist()}."
            )
        if not np.isfinite(self.simplex).all():
            raise ValueError(f"`simplex` must be finite, got {self.simplex.tolist()}.")
        if not (self.reflection > 0 and self.expansion > 1 and 0 < self.contraction < 1 and 0 < self.shrinkage < 1):
            raise ValueError(
                "`reflection` must be positive, `expansion` above 1, `contraction` and `shrinkage` in (0, 1), got "
                f"{self.reflection}, {self.expansion}, {self.contraction} and {self.shrinkage}."
            )

    @property
    def at_iteration_start(self) -> bool:
        """Whether every vertex has a value and the pending point is a reflection."""
        return self._stage == "reflect"

    @property
    def measured(self) -> bool:
        """Whether every vertex of the starting simplex has had its value."""
        return self._stage != "initial"

    @property
    def best_point(self) -> Array:
        """The vertex of lowest value, `(N,)`; where none has one yet, the first."""
        best: Array = self.simplex[int(np.argmin(self.values))].copy()
        return best

    @property
    def best_value(self) -> float:
        """The lowest value of a vertex; infinite where none has one yet."""
        return float(self.values.min())

    def ask(self) -> Array:
        """The point whose value is wanted, `(N,)`, float64; the same until [`tell`]."""
        point: Array = self._point.copy()
        return point

    def tell(self, value: float) -> None:
        """
        Takes the value of the point that [`ask`] gives.

        Args:
            value (`float`):
                Value, possibly infinite.

        Raises:
            ValueError: If it is not a number. The optimizer is left as it was.
        """
        if np.isnan(value):
            raise ValueError(f"The value of {self._point.tolist()} is not a number. Give infinity for a failed trial.")
        {
            "initial": self._tell_vertex,
            "shrink": self._tell_vertex,
            "reflect": self._tell_reflected,
            "expand": self._tell_expanded,
            "outside": self._tell_contracted,
            "inside": self._tell_contracted,
        }[self._stage](float(value))

    def revalue(self, value: float) -> None:
        """
        Replaces the value of the best vertex, for an objective that drifts.

        Args:
            value (`float`):
                New value.

        Raises:
            ValueError: If an iteration is under way (see [`at_iteration_start`]), or the value is not a number.
        """
        if not self.at_iteration_start or np.isnan(value):
            raise ValueError(
                f"The best vertex takes a new number only at the start of an iteration; got {value} at the stage "
                f"{self._stage!r}."
            )
        self.values[0] = value
        self._start_iteration()

    def _tell_vertex(self, value: float) -> None:
        self.values[self._index] = value
        self._index += 1
        if self._index == len(self.values):
            self._start_iteration()
        else:
            self._point = self.simplex[self._index].copy()

    def _tell_reflected(self, value: float) -> None:
        self._reflected, self._reflected_value = self._point, value
        along = self.reflection
        if value < self.values[0]:
            self._propose("expand", self.reflection * self.expansion)
        elif value < self.values[-2]:
            self._replace_worst(self._point, value)
        elif value < self.values[-1]:
            self._propose("outside", self.contraction * along)
        else:
            self._propose("inside", -self.contraction)

    def _tell_expanded(self, value: float) -> None:
        if value < self._reflected_value:
            self._replace_worst(self._point, value)
        else:
            self._replace_worst(self._reflected, self._reflected_value)

    def _tell_contracted(self, value: float) -> None:
        outside = self._stage == "outside"
        if value <= self._reflected_value if outside else value < self.values[-1]:
            self._replace_worst(self._point, value)
            return
        best = self.simplex[0]
        self.simplex[1:] = self._boxed(best + self.shrinkage * (self.simplex[1:] - best))
        self._stage, self._index = "shrink", 1
        self._point = self.simplex[1].copy()

    def _propose(self, stage: str, along: float) -> None:
        """Moves on to the point beyond the centroid, seen from the worst vertex, by `along` times their distance."""
        centroid = np.add.reduce(self.simplex[:-1], 0) / self.simplex.shape[1]
        self._stage = stage
        self._point = self._boxed((1 + along) * centroid - along * self.simplex[-1])

    def _replace_worst(self, point: Array, value: float) -> None:
        self.simplex[-1], self.values[-1] = point, value
        self._start_iteration()

    def _start_iteration(self) -> None:
        order = np.argsort(self.values, kind="stable")
        self.simplex, self.values = self.simplex[order], self.values[order]
        self._propose("reflect", self.reflection)

    def _boxed(self, points: Array) -> Array:
        clipped: Array = np.clip(points, self.lower, self.upper)
        return clipped

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed search needs, of JSON's types."""
        return {
            "simplex": self.simplex.tolist(),
            "values": _finite(self.values),
            "stage": self._stage,
            "index": self._index,
            "point": self._point.tolist(),
            "reflected": self._reflected.tolist(),
            "reflected_value": _finite(np.array([self._reflected_value]))[0],
            "lower": _finite(self.lower),
            "upper": _finite(self.upper),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restores [`state_dict`].

        Raises:
            KeyError: If a part is missing.
            ValueError: If it is of another number of coordinates.
        """
        simplex = np.array(state["simplex"], dtype=np.float64)
        if simplex.shape != self.simplex.shape:
            raise ValueError(f"The saved simplex has the shape {simplex.shape}, this one {self.simplex.shape}.")
        point, reflected = np.array(state["point"], dtype=float), np.array(state["reflected"], dtype=float)
        values, lower, upper = (
            np.array([missing if number is None else number for number in state[name]], dtype=np.float64)
            for name, missing in (("values", np.inf), ("lower", -np.inf), ("upper", np.inf))
        )
        reflected_value = np.inf if state["reflected_value"] is None else float(state["reflected_value"])
        stage, index = state["stage"], int(state["index"])
        self.simplex, self.values, self._point, self._reflected = simplex, values, point, reflected
        self.lower, self.upper = lower, upper
        self._stage, self._index, self._reflected_value = stage, index, reflected_value


def _finite(numbers: Array) -> list[float | None]:
    """JSON has no infinity: it becomes `None`."""
    return [float(number) if np.isfinite(number) else None for number in numbers]
