import math

import pytest
import torch

from trl_ext.constrained_ppo.multipliers import Constraint, LagrangeMultipliers


INTEGRAL = {"proportional": 0.0, "momentum": 0.0}


def play(multipliers, steps, rate=0.05):
    """Gradient ascent on `-x^2 / 2 + weight * x` against the multipliers: the saddle is `x = weight = 1`."""
    x, path = 0.0, []
    for _ in range(steps):
        weight = float(multipliers.update([x])[0])
        x += rate * (weight - x)
        path.append((x, weight))
    return torch.tensor(path)


def test_saddle_point_of_a_toy_problem():
    constraint = [Constraint("x", 1.0, ">=")]
    integral = play(LagrangeMultipliers(constraint, "none", learning_rate=0.05, **INTEGRAL), 4000)
    torch.testing.assert_close(integral.mean(dim=0), torch.ones(2), rtol=0, atol=0.03)
    damped = play(LagrangeMultipliers(constraint, "none", learning_rate=0.05, momentum=0.0, proportional=1.0), 4000)
    torch.testing.assert_close(damped[-1], torch.ones(2), rtol=0, atol=1e-3)

    def swing(path):
        return float(path[300:600, 0].max() - path[300:600, 0].min())

    assert swing(damped) < 0.1 * swing(integral[:600]) or swing(integral) < 1e-6


def test_integral_only_swings_where_the_proportional_term_settles():
    """With a policy that only integrates, the paper's update is an undamped oscillator."""
    swings = {}
    for proportional in (0.0, 2.0):
        multipliers = LagrangeMultipliers(
            [Constraint("x", 0.7)], "tanh", learning_rate=0.05, momentum=0.0, proportional=proportional
        )
        x, path = 0.4, []
        for _ in range(600):
            x += 0.05 * float(multipliers.update([x])[0])
            path.append(x)
        swings[proportional] = max(path[-200:]) - min(path[-200:])
    assert swings[0.0] > 0.2 and swings[2.0] < 1e-3


@pytest.mark.parametrize(
    ("kind", "mean", "sign"),
    [(">=", 0.2, 1), (">=", 0.8, -1), ("<=", 0.8, 1), ("<=", 0.2, -1), ("==", 0.2, 1), ("==", 0.8, -1)],
)
def test_direction_of_the_step(kind, mean, sign):
    multipliers = LagrangeMultipliers([Constraint("x", 0.5, kind)], "tanh", **INTEGRAL)
    multipliers.update([mean])
    assert math.copysign(1, multipliers.values()[0]) == sign
    assert multipliers.violations()[0] == pytest.approx(0.3 * sign)


def test_steps_by_hand():
    multipliers = LagrangeMultipliers(
        [Constraint("x", 1.0)], "tanh", learning_rate=0.1, momentum=0.5, proportional=2.0
    )
    weights = multipliers.update([0.5])  # violation 0.5: l = 0.05
    assert float(weights[0]) == pytest.approx(math.tanh(0.05 + 2 * 0.5))
    weights = multipliers.update([0.8])  # violation 0.2, buffer 0.25 + 0.2: l = 0.05 + 0.045
    assert float(multipliers.values()[0]) == pytest.approx(0.095)
    assert float(weights[0]) == pytest.approx(math.tanh(0.095 + 2 * 0.2))


@pytest.mark.parametrize("squash", ["sigmoid", "tanh", "softplus", "none"])
def test_official_step_carries_the_slope(squash):
    multipliers = LagrangeMultipliers(
        [Constraint("x", 1.0)], squash, learning_rate=0.1, init=0.7, squash_gradient=True, **INTEGRAL
    )
    point = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    functions = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "softplus": torch.nn.functional.softplus}
    functions.get(squash, lambda x: x)(point).backward()
    multipliers.update([0.4])
    assert float(multipliers.values()[0]) == pytest.approx(0.7 + 0.1 * 0.6 * float(point.grad))


def test_start_of_the_papers_methods():
    mu = LagrangeMultipliers([Constraint("a", 1.0, ">="), Constraint("b", 1.0, ">=")])
    xi = LagrangeMultipliers([Constraint("a", 1.0), Constraint("b", 1.0)])
    assert mu.squash == "sigmoid" and mu.weights().tolist() == [0.5, 0.5]
    assert xi.squash == "tanh" and xi.weights().tolist() == [0.0, 0.0]


def test_projection_bounds_delay_window_and_derivative():
    constraint = [Constraint("x", 0.0, ">=")]
    projected = LagrangeMultipliers(constraint, "none", init=0.1, **INTEGRAL)
    projected.update([100.0])
    assert projected.values().tolist() == [0.0] and projected.weights().tolist() == [0.0]
    bounded = LagrangeMultipliers(constraint, "none", maximum=2.0, **INTEGRAL)
    assert float(bounded.update([-1000.0])[0]) == 2.0
    delayed = LagrangeMultipliers(constraint, "tanh", delay_steps=2, **INTEGRAL)
    found = []
    for _ in range(3):
        delayed.update([-1.0])
        found.append(float(delayed.values()[0]))
    assert found == pytest.approx([0.0, 0.0, 0.1])
    averaged = LagrangeMultipliers(constraint, "tanh", window=2, **INTEGRAL)
    averaged.update([-1.0])
    averaged.update([-3.0])
    averaged.update([-5.0])
    assert float(averaged.violations()[0]) == pytest.approx(4.0)
    changing = LagrangeMultipliers(constraint, "none", derivative=10.0, learning_rate=0.0, **INTEGRAL)
    assert float(changing.update([-1.0])[0]) == 0.0
    assert float(changing.update([-1.5])[0]) == pytest.approx(5.0)


def test_resumed_equals_uninterrupted():
    def build():
        return LagrangeMultipliers(
            [Constraint("a", 0.3), Constraint("b", 0.6)], learning_rate=0.3, momentum=0.4, derivative=0.2, window=3
        )

    generator = torch.Generator().manual_seed(0)
    means = torch.rand(12, 2, generator=generator)
    whole, first = build(), build()
    expected = [whole.update(mean).tolist() for mean in means]
    for mean in means[:5]:
        first.update(mean)
    resumed = build()
    resumed.load_state_dict(first.state_dict())
    assert [resumed.update(mean).tolist() for mean in means[5:]] == expected[5:]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_constraints_do_not_mix(count):
    constraints = [Constraint(index, 0.1 * index) for index in range(count)]
    together = LagrangeMultipliers(constraints)
    together.update([0.5] * count)
    for index, constraint in enumerate(constraints):
        alone = LagrangeMultipliers([constraint])
        alone.update([0.5])
        assert together.weights()[index] == alone.weights()[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Constraint("x", 1.0, ">"), "`kind`.*'x'.*'>'"),
        (lambda: Constraint("x", math.nan), "`threshold`.*'x'.*nan"),
        (lambda: LagrangeMultipliers([]), "`constraints` is empty"),
        (
            lambda: LagrangeMultipliers([Constraint("x", 0.5, ">="), Constraint("x", 0.4, "<=")]),
            "'x' contradict.*>= 0.5 and <= 0.4",
        ),
        (lambda: LagrangeMultipliers([Constraint("x", 0.5)], "relu"), "multiplier_squash.*'relu'"),
        (lambda: LagrangeMultipliers([Constraint("x", 0.5)], learning_rate=-1.0), "multiplier_learning_rate.*-1"),
        (lambda: LagrangeMultipliers([Constraint("x", 0.5)], momentum=1.0), "multiplier_momentum.*1.0"),
        (lambda: LagrangeMultipliers([Constraint("x", 0.5)], maximum=0.0), "multiplier_max.*0.0"),
        (lambda: LagrangeMultipliers([Constraint("x", 0.5)], window=0), "multiplier_window"),
    ],
)
def test_wrong_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("means", [[0.1, 0.2], [math.nan], []])
def test_wrong_means_leave_the_multipliers(means):
    multipliers = LagrangeMultipliers([Constraint("x", 0.5)])
    multipliers.update([0.1])
    before = multipliers.state_dict()
    with pytest.raises(ValueError, match="one finite mean"):
        multipliers.update(means)
    assert multipliers.state_dict() == before
    with pytest.raises(ValueError, match="1 multipliers.*2 constraints"):
        LagrangeMultipliers([Constraint("x", 0.5), Constraint("y", 0.5)]).load_state_dict(before)
