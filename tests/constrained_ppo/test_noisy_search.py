"""The threshold search where scores are noisy: restarts, smoothing and Optuna's sampler."""

import json

import numpy as np
import pytest

from tests.benchmarks.threshold_search import BUDGET, FUNCTIONS, LOWER, scaled, search
from trl_ext.constrained_ppo.threshold_search.config import ThresholdSearchConfig
from trl_ext.constrained_ppo.threshold_search.search import ThresholdSearch, Trial
from trl_ext.constrained_ppo.threshold_search.smoothing import smoothed_scores


def test_smoothed_scores_by_hand():
    points, scores = np.array([[0.0, 0.0], [0.1, 0.0], [0.0, 0.0]]), np.array([1.0, 2.0, 4.0])
    ages = np.array([2.0, 1.0, 0.0])
    expected = np.empty(3)
    for i in range(3):
        weights = [
            np.exp(-np.sum((points[i] - points[j]) ** 2) / (2 * 0.1**2)) * 0.5 ** (ages[j] / 2) for j in range(3)
        ]
        expected[i] = np.dot(weights, scores) / np.sum(weights)
    np.testing.assert_allclose(smoothed_scores(points, scores, ages, 0.1, 2.0), expected, rtol=1e-12)
    np.testing.assert_allclose(smoothed_scores(points, scores, ages, 0.0, 2.0), [3.0, 2.0, 3.0])
    # However old all scores are, they are still told apart
    assert smoothed_scores(points, scores, ages + 1e5, 0.0, 2.0).tolist() == pytest.approx([3.0, 2.0, 3.0])


def test_the_budget_is_used_and_brings_the_named_best_nearer_to_the_peak():
    """With noise of a tenth of the range, the published search stops after 14 of 40 evaluations on average."""
    regrets = {}
    for settings in ({"on_convergence": "stop"}, {}):
        runs = np.array([[search(name, 0.1, seed, settings) for seed in range(100, 108)] for name in FUNCTIONS])
        used = runs[..., 0]
        assert (used == BUDGET).all() if not settings else used.mean() < BUDGET / 2
        regrets[len(settings)] = runs[..., 2].mean()
    assert regrets[0] < 0.65 * regrets[1] and regrets[0] < 0.07


def converge(**settings):
    """A search over two thresholds of a hill at (1.0, 1.2), driven until its first restart."""
    config = ThresholdSearchConfig(
        **{"lower": {"a": 0.5, "b": 0.5}, "upper": {"a": 1.5, "b": 1.5}, "initial_range": 0.5, **settings}
    )
    searching = ThresholdSearch(config, ["a", "b"], ["==", "=="], total_steps=1000)
    searching.start([0.7, 0.7], hill([0.7, 0.7]))
    step = 0
    while searching.finished is None and searching.num_restarts == 0:
        step += 1
        searching.observe_evaluation(step, searching.thresholds, hill(searching.thresholds))
    return searching, step


def hill(at):
    return 1 - (at[0] - 1.0) ** 2 - (at[1] - 1.2) ** 2


def test_a_restart_is_half_a_box_wide_and_measures_its_centre_again():
    searching, step = converge()
    centre = searching.named_best()[0]
    assert np.abs(np.array(centre) - [1.0, 1.2]).max() < 0.1
    simplex = searching.optimizer.simplex
    np.testing.assert_allclose(simplex[0], centre)
    np.testing.assert_allclose(np.linalg.norm(simplex[1:] - simplex[0], axis=1), 0.5)
    assert (simplex >= 0.5).all() and (simplex <= 1.5).all()
    assert abs(np.linalg.det(simplex[1:] - simplex[0])) > 0.1
    assert searching.trial.source == "measured" and searching.trial.thresholds == simplex[0].tolist()
    for _ in range(3):
        assert searching.trial.source == "measured"  # not taken from the scores before the restart
        step += 1
        searching.observe_evaluation(step, searching.thresholds, hill(searching.thresholds))
    again, _ = converge()
    assert np.array_equal(again.optimizer.simplex, simplex)
    stopped, _ = converge(on_convergence="stop")
    assert stopped.finished == "converged" and stopped.num_restarts == 0


@pytest.mark.parametrize("corner", [[0.5, 0.5], [1.5, 0.5], [1.5, 1.5]])
def test_a_restart_in_a_corner_of_the_box_has_volume(corner):
    for seed in range(20):
        searching, _ = converge(seed=seed)
        searching.trial = None
        last = [trial for trial in searching.history if trial.source != "cached"][-1]
        last.thresholds, last.gold = corner, 99.0
        searching._restart()
        simplex = searching.optimizer.simplex
        assert np.allclose(simplex[0], corner) and abs(np.linalg.det(simplex[1:] - simplex[0])) > 0.05


def test_a_lucky_score_is_not_named_best():
    searching = noisy("nelder-mead")
    searching.start([0.7, 0.7], 0.4)
    searching.history = [
        Trial([x, 1.2], "measured", i, i, i, [x, 1.2], hill([x, 1.2]) + (0.1 if i == 6 else 0.0), True)
        for i, x in enumerate(np.linspace(0.5, 1.5, 21).tolist())
    ]
    assert abs(searching.named_best()[0][0] - 1.0) <= 0.1
    searching.config = ThresholdSearchConfig(smoothing=0.0)
    assert searching.named_best() == ([0.8, 1.2], hill([0.8, 1.2]) + 0.1)


def test_an_unreached_proposal_stands_for_the_rewards_of_its_policy():
    searching = noisy("nelder-mead")
    searching.start([0.7, 0.7], 0.4)
    searching.history.append(Trial([1.4, 1.4], "measured", 1, 1, 2, [0.9, 1.0], 0.9, False))
    assert searching.named_best()[0] == [0.9, 1.0]


def drive(searching, generator, step, until, name="quadratic, 2", noise=0.1):
    _, function = scaled(name)
    asked = []
    while searching.finished is None and searching.num_gold_evaluations < until:
        step += 1
        asked.append(searching.thresholds)
        gold = float(function(np.array(asked[-1]) - LOWER, 1.0) + noise * generator.standard_normal())
        searching.observe_evaluation(step, asked[-1], gold)
    return asked, step


def noisy(sampler):
    config = ThresholdSearchConfig(
        sampler=sampler, lower={"a": 0.5, "b": 0.5}, upper={"a": 1.5, "b": 1.5}, initial_range=0.5
    )
    return ThresholdSearch(config, ["a", "b"], ["==", "=="], total_steps=1000)


@pytest.mark.parametrize("sampler", ["nelder-mead", "tpe"])
@pytest.mark.parametrize("stop", [2, 9, 25, 34])
def test_resumed_after_restarts_or_proposals_equals_uninterrupted(sampler, stop):
    if sampler == "tpe":
        pytest.importorskip("optuna")
    generator, whole = np.random.default_rng(0), noisy(sampler)
    whole.start([0.7, 0.7], 0.4)
    _, step = drive(whole, generator, 0, stop)
    resumed = noisy(sampler)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
    state = generator.bit_generator.state
    asked, _ = drive(whole, generator, step, BUDGET)
    generator.bit_generator.state = state
    assert drive(resumed, generator, step, BUDGET)[0] == asked and len(asked) == BUDGET - stop
    assert resumed.state_dict() == whole.state_dict()
    if sampler == "nelder-mead":
        assert whole.num_restarts >= 1
    else:
        points = np.array(whole.optimizer.points)
        assert (points >= 0.5).all() and (points <= 1.5).all() and len(np.unique(points, axis=0)) == len(points)


def test_a_search_of_another_sampler_is_refused():
    searching = noisy("nelder-mead")
    searching.start([0.7, 0.7], 0.4)
    state = searching.state_dict()
    state["optimizer"] = {**state["optimizer"], "points": []}
    with pytest.raises(ValueError, match="`search.sampler='tpe'`, and this run has 'nelder-mead'.*`sampler: tpe`"):
        noisy("nelder-mead").load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "gp"}, "`search.sampler` must be one of 'nelder-mead', 'tpe', got 'gp'"),
        ({"on_convergence": "train"}, "`search.on_convergence` must be one of"),
        ({"smoothing": 1.0}, "`search.smoothing` must be a number of at least 0 and smaller than 1, got 1.0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ThresholdSearchConfig(**settings)
