import math

import pytest
import torch

from trl_ext.constrained_ppo.constrained_ppo_config import PRESETS
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
    damped = play(LagrangeMultipliers(constraint, "none", learning_rate=0.05, momentum=0.0, proportional=1.0), 1000)
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


def new_default(constraints, **settings):
    """The multipliers of the preset `"all"`, with a filter that expects slow means."""
    settings = {"learning_rate": 0.05, "momentum": 0.0, "proportional": 3.0, "maximum": 5.0, "drift": 0.05, **settings}
    return LagrangeMultipliers(constraints, "none", anti_windup=True, **settings)


def test_spreads_are_the_unit_of_violations():
    """One set of gains: a reward a thousand times as large, with its spread, has the same weights."""
    small, large = new_default([Constraint("x", 0.5)]), new_default([Constraint("x", 500.0)])
    small.set_spreads([0.2])
    large.set_spreads([200.0])
    for mean in (0.1, 0.3, 0.45, 0.52, 0.5):
        weights = small.update([mean], [0.025]), large.update([1000 * mean], [25.0])
        torch.testing.assert_close(*weights)


def test_filter_by_hand():
    multipliers = new_default([Constraint("x", 1.0)], learning_rate=0.0, proportional=1.0)
    multipliers.set_spreads([2.0])
    assert float(multipliers.update([0.0], [0.4])[0]) == pytest.approx(0.5)  # the first mean is taken as it is
    # Variances: 0.4^2 before, (0.05 * 2)^2 of the drift, 0.2^2 of the batch
    gain = (0.16 + 0.01) / (0.16 + 0.01 + 0.04)
    assert float(multipliers.update([1.0], [0.2])[0]) == pytest.approx((1.0 - gain) / 2)
    assert multipliers.state_dict()["filtered_variances"] == [pytest.approx((1 - gain) * 0.17)]
    assert float(multipliers.update([1.0], [0.0])[0]) == pytest.approx(0.0)  # exact: the gain is 1
    # Ten standard deviations are no noise: the variance of the walk is what the noise leaves of the step
    gain = (100.0 - 0.04) / 100.0
    assert float(multipliers.update([-9.0], [0.2])[0]) == pytest.approx(10 * gain / 2)


def test_a_policy_that_runs_away_is_followed_at_once():
    """A mean that moves by a spread an update, eight standard errors: the weight turns with it."""
    multipliers = new_default([Constraint("x", 1.0)])
    for mean in (0.0, 0.0, 0.0, 1.0, 2.0):
        weight = float(multipliers.update([mean], [0.125])[0])
    assert weight < -2.5  # the proportional term alone would be -3


def test_noise_of_a_batch_is_no_full_swing_of_a_weight():
    """Means at the threshold, with the standard error of 64 responses: the paper's form against the new default."""
    generator = torch.Generator().manual_seed(0)
    means = 0.5 + 0.06 / 8 * torch.randn(200, 1, generator=generator, dtype=torch.float64)
    raw = LagrangeMultipliers([Constraint("x", 0.5)], "tanh", learning_rate=0.5, proportional=40.0)
    slow = new_default([Constraint("x", 0.5)])
    xi = PRESETS["xi"]
    default = new_default([Constraint("x", 0.5)], proportional=xi.proportional, drift=xi.drift, maximum=xi.maximum)
    swings = [torch.stack([raw.update(mean) for mean in means]).std()]
    for filtered in (slow, default):
        filtered.set_spreads([0.06])
        swings.append(torch.stack([filtered.update(mean, [0.06 / 8]) for mean in means]).std())
    # Of weights within 1, 5 and 2
    assert swings[0] > 0.25 and swings[1] < 0.2 and swings[2] < 0.35


@pytest.mark.parametrize("episodes", [64, 512])
def test_rates_do_not_depend_on_the_size_of_a_rollout(episodes):
    multipliers = new_default([Constraint("x", 1.0, ">=")])
    for _ in range(40):
        multipliers.update([0.5], [1 / episodes**0.5])
    assert float(multipliers.values()[0]) == pytest.approx(40 * 0.05 * 0.5)
    assert float(multipliers.weights()[0]) == pytest.approx(1.0 + 3 * 0.5)


@pytest.mark.parametrize("kind", [">=", "<="])
def test_a_constraint_that_was_slack_for_long_acts_at_once(kind):
    slack, violated = (1.0, -0.2) if kind == ">=" else (-1.0, 0.2)
    weights = {}
    for name, multipliers in {
        "paper": LagrangeMultipliers([Constraint("x", 0.0, kind)], "sigmoid"),
        "new": new_default([Constraint("x", 0.0, kind)]),
    }.items():
        for _ in range(227):
            multipliers.update([slack], [0.125])
        weights[name] = [float(multipliers.update([violated], [0.125])[0]) for _ in range(10)]
    assert max(weights["paper"]) < 1e-6
    assert max(weights["new"][:5]) > 0.1 and weights["new"][-1] > 0.5


def test_a_multiplier_waits_while_its_weight_is_at_a_bound():
    multipliers = new_default([Constraint("x", 0.0)])
    for _ in range(100):
        multipliers.update([-2.0], [0.1])  # 3 * 2 is beyond 5 without any multiplier
    assert float(multipliers.values()[0]) == 0.0 and multipliers.exhausted() == [True]
    assert multipliers.saturated() == [True] and multipliers.weights().tolist() == [5.0]
    bounded = new_default([Constraint("x", 0.0, ">=")])
    bounded.update([2.0], [0.1])
    assert bounded.exhausted() == [False] and bounded.saturated() == [False]  # slack: nothing to do
    exponential = LagrangeMultipliers([Constraint("x", 0.0, ">=")], "exp", maximum=5.0, anti_windup=True)
    for _ in range(50):
        exponential.update([-10.0])
    assert exponential.weights().tolist() == pytest.approx([5.0]) and exponential.exhausted() == [True]


def test_state_goes_by_name_and_an_old_one_is_refused():
    def build(order):
        return new_default([Constraint(name, {"a": 0.3, "b": 0.6}[name]) for name in order])

    generator = torch.Generator().manual_seed(0)
    means = torch.rand(12, 2, generator=generator, dtype=torch.float64)
    whole, first, resumed = build("ab"), build("ab"), build("ba")
    for multipliers in (whole, first):
        multipliers.set_spreads([0.5, 2.0])
    expected = [whole.update(mean, [0.1, 0.2]).tolist() for mean in means]
    for mean in means[:5]:
        first.update(mean, [0.1, 0.2])
    resumed.load_state_dict(first.state_dict())
    found = [resumed.update(mean.flip(0), [0.2, 0.1]).tolist()[::-1] for mean in means[5:]]
    assert found == expected[5:]
    others = new_default([Constraint("a", 0.3), Constraint("c", 0.3)])
    with pytest.raises(ValueError, match=r"multipliers of \['a', 'b'\] and this run of \['a', 'c'\]"):
        others.load_state_dict(first.state_dict())
    old = {name: entry for name, entry in first.state_dict().items() if name not in ("names", "spreads", "drift")}
    with pytest.raises(ValueError, match="earlier version.*'xi-paper'.*multiplier_units: raw"):
        build("ab").load_state_dict(old)
    raw = LagrangeMultipliers([Constraint("a", 0.3), Constraint("b", 0.6)])
    raw.load_state_dict(old)
    assert torch.equal(raw.values(), first.values())
