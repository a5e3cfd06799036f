import json

import numpy as np
import pytest
from scipy.optimize import minimize

from trl_ext.constrained_ppo.threshold_search.nelder_mead import NelderMead


def rosenbrock(x):
    return float(sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2))


def sphere(x):
    return float(((x - np.arange(1, len(x) + 1) / 7) ** 2).sum())


def himmelblau(x):
    return float((x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2)


def spikes(x):
    """Rough enough that contractions fail and the simplex shrinks."""
    return float(np.abs(np.sin(9 * x)).sum() + 0.1 * np.abs(x).sum() + 0.013 * x[0])


def visited_by_scipy(function, simplex, calls, bounds=None):
    points = []

    def recorded(x):
        points.append(np.array(x))
        return function(x)

    minimize(
        recorded,
        simplex[0],
        method="Nelder-Mead",
        bounds=bounds,
        options={"initial_simplex": simplex, "maxfev": calls, "xatol": 0.0, "fatol": 0.0},
    )
    return points


def visited_by_asking(optimizer, function, calls, stages=None):
    points = []
    for _ in range(calls):
        if stages is not None:
            stages.add(optimizer._stage)
        points.append(optimizer.ask())
        optimizer.tell(function(points[-1]))
    return points


SIMPLEX = np.array([[-1.2, 1.0], [-0.7, 1.3], [-1.1, 0.2]])
CASES = {
    "rosenbrock": (rosenbrock, SIMPLEX, None),
    "rosenbrock-3": (rosenbrock, np.vstack([np.full(3, -0.8), np.full(3, -0.8) + 0.7 * np.eye(3)]), None),
    "himmelblau": (himmelblau, SIMPLEX * 2, None),
    "sphere-1": (sphere, np.array([[4.0], [3.1]]), None),
    "sphere-5": (sphere, np.vstack([np.zeros(5), np.diag([0.3, 0.5, -0.4, 0.6, 0.7])]), None),
    "spikes": (spikes, SIMPLEX, None),
    "box": (rosenbrock, SIMPLEX, [(-1.3, 0.6), (-0.1, 1.25)]),
    "box-himmelblau": (himmelblau, SIMPLEX * 2, [(-2.5, 2.9), (0.0, 2.9)]),
}


@pytest.mark.parametrize("case", CASES)
def test_visits_the_points_of_scipy_exactly(case):
    function, simplex, bounds = CASES[case]
    lower, upper = (None, None) if bounds is None else zip(*bounds, strict=True)
    theirs = visited_by_scipy(function, simplex, 120, bounds)
    ours = visited_by_asking(NelderMead(simplex, lower, upper), function, len(theirs))
    assert len(theirs) > 30 and np.array_equal(np.array(ours), np.array(theirs))


def test_every_move_is_covered_by_the_comparison():
    stages = set()
    for function, simplex, _ in CASES.values():
        visited_by_asking(NelderMead(simplex), function, 120, stages)
    assert stages == {"initial", "reflect", "expand", "outside", "inside", "shrink"}


def test_one_iteration_by_hand():
    optimizer = NelderMead([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    for value in (1.0, 2.0, 3.0):
        optimizer.tell(value)
    assert optimizer.ask().tolist() == [1.0, -1.0]  # reflection of (0, 1) in (0.5, 0)
    optimizer.tell(0.5)
    assert optimizer.ask().tolist() == [1.5, -2.0]  # expansion
    optimizer.tell(0.7)
    assert optimizer.best_point.tolist() == [1.0, -1.0] and optimizer.best_value == 0.5
    assert optimizer.ask().tolist() == [0.0, -1.0]  # (1, 0) is the worst now
    optimizer.tell(1.5)
    assert optimizer.ask().tolist() == [0.25, -0.75]  # outside contraction
    optimizer.tell(9.0)
    assert optimizer.ask().tolist() == [0.5, -0.5]  # shrinking towards (1, -1)


def test_minimum_in_the_corner_of_the_box():
    """The official code has no bounds, and its search leaves them."""
    optimizer = NelderMead([[0.2, 0.2], [0.4, 0.2], [0.2, 0.5]], lower=[0.0, 0.1], upper=[0.6, 0.7])
    points = np.array(visited_by_asking(optimizer, lambda x: float(-x[0] - x[1]), 80))
    assert (points >= [0.0, 0.1]).all() and (points <= [0.6, 0.7]).all()
    np.testing.assert_allclose(optimizer.best_point, [0.6, 0.7], atol=1e-6)


@pytest.mark.parametrize("stop", range(1, 40))
def test_resumed_at_any_point_equals_uninterrupted(stop):
    optimizer = NelderMead(SIMPLEX, [-1.15, -0.1], [0.5, 1.1])
    visited_by_asking(optimizer, spikes, stop)
    resumed = NelderMead(SIMPLEX + 0.1)
    resumed.load_state_dict(json.loads(json.dumps(optimizer.state_dict(), allow_nan=False)))
    assert np.array_equal(
        visited_by_asking(resumed, spikes, 20), visited_by_asking(optimizer, spikes, 20)
    ) and np.array_equal(resumed.best_point, optimizer.best_point)


def test_new_value_of_the_best_vertex():
    optimizer = NelderMead([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="'initial'"):
        optimizer.revalue(1.0)
    for value in (1.0, 2.0, 3.0):
        optimizer.tell(value)
    optimizer.revalue(5.0)
    assert optimizer.best_point.tolist() == [1.0, 0.0] and optimizer.values.tolist() == [2.0, 3.0, 5.0]
    assert optimizer.ask().tolist() == [1.0, 1.0]  # reflection of (0, 0), the worst now


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"simplex": [[0.0, 0.0], [1.0, 1.0]]}, r"shape \(N\+1, N\), got \(2, 2\)"),
        ({"simplex": [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]}, "spans no volume"),
        ({"simplex": [[0.0], [np.nan]]}, "must be finite"),
        ({"simplex": [[0.0], [1.0]], "lower": [2.0], "upper": [1.0]}, r"`lower` must lie below.*\[2.0\]"),
        ({"simplex": [[0.0], [1.0]], "lower": [0.0, 0.0]}, "one bound for each of the 1"),
        ({"simplex": [[3.0], [4.0]], "upper": [0.0], "lower": [-0.5]}, "spans no volume within the bounds"),
        ({"simplex": [[0.0], [1.0]], "expansion": 1.0}, "`expansion` above 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NelderMead(**arguments)


def test_wrong_values():
    optimizer = NelderMead([[0.0], [1.0]])
    with pytest.raises(ValueError, match="not a number"):
        optimizer.tell(float("nan"))
    assert optimizer.ask().tolist() == [0.0]
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        optimizer.load_state_dict(NelderMead(SIMPLEX).state_dict())
