"""The search against a fake trainer whose rewards drift towards their thresholds."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from transformers import TrainerControl, TrainerState

from trl_ext.constrained_ppo.multipliers import Constraint, LagrangeMultipliers
from trl_ext.constrained_ppo.rollout import Rollout
from trl_ext.constrained_ppo.threshold_search.callback import SEARCH_FILE, ThresholdSearchCallback
from trl_ext.constrained_ppo.threshold_search.config import ThresholdSearchConfig
from trl_ext.constrained_ppo.threshold_search.search import ThresholdSearch


START = {"meteor": 0.2, "intent": 0.43}
PEAK = {"meteor": 0.236, "intent": 0.49}
PartialState(cpu=True)  # the logger wants it


def hill(means, step):
    return 1.0 - sum(((means[name] - PEAK[name]) / PEAK[name]) ** 2 for name in means)


class FakeController:
    def __init__(self, order, names):
        self.order, self.constrained = list(order), [names.index(name) for name in order]
        self.multipliers = LagrangeMultipliers([Constraint(name, 0.0) for name in order])

    @property
    def constraints(self):
        return self.multipliers.constraints

    def constrained_names(self):
        return self.order

    def set_constraints(self, constraints):
        self.multipliers.set_thresholds([constraint.threshold for constraint in constraints])


class FakeTrainer:
    """
    Rewards are in the order METEOR, intent, constraints in the order intent, METEOR, as in the official code.

    Args:
        folder: Output folder.
        gold: Gold metric of mean rewards and step.
        rate: Share of its distance to the threshold that a reward goes in a step.
        scale: Factor of all rewards.
    """

    def __init__(
        self,
        folder,
        gold=hill,
        rate=0.5,
        scale=1.0,
        max_steps=400,
        order=("intent", "meteor"),
        steps_per_rollout=1,
        **settings,
    ):
        self.gold, self.rate, self.scale, self.steps_per_rollout = gold, rate, scale, steps_per_rollout
        self.reward_func_names = ["meteor", "intent"]
        self.controller = FakeController(order, self.reward_func_names)
        self.multipliers = self.controller.multipliers
        self.eval_dataset, self.gold_reward = ["validation"], object()
        self.args = SimpleNamespace(output_dir=str(folder), world_size=1)
        self.state, self.control = TrainerState(max_steps=max_steps), TrainerControl()
        self.means = dict(START)
        self.stop_reason, self.logged, self.evaluated, self.applied = None, [], [], []
        self.rollout = Rollout()
        self.callback = ThresholdSearchCallback(self, ThresholdSearchConfig.from_dict(settings))

    @property
    def search(self):
        return self.callback.search

    def sample(self):
        means = [self.scale * self.means[name] for name in self.reward_func_names]
        return torch.tensor([means, means], dtype=torch.float64)

    def log(self, logs):
        self.logged.append(logs)

    def evaluate(self, prefix="eval"):
        self.rollout = Rollout("evaluation", self.sample() + 10)  # whatever was sampled last, such as another split
        metrics = {f"{prefix}_rewards/{name}/mean": self.scale * self.means[name] for name in self.reward_func_names}
        metrics[f"{prefix}_gold"] = self.gold(self.means, self.state.global_step)
        if prefix == "eval":
            self.evaluated.append(self.state.global_step)
        self.control.should_evaluate = False
        self.callback.on_evaluate(self.args, self.state, self.control, metrics=metrics)

    def end_training(self, reason):
        self.stop_reason, self.control.should_training_stop = reason, True

    def begin(self):
        self.callback.on_train_begin(self.args, self.state, self.control)

    def train(self, until=None):
        """Trains to the end, or until a step."""
        until = self.state.max_steps if until is None else until
        while self.state.global_step < until and not self.control.should_training_stop:
            for constraint in self.multipliers.constraints:
                name = constraint.reward
                self.means[name] += self.rate * (constraint.threshold / self.scale - self.means[name])
            if self.state.global_step % self.steps_per_rollout == 0:
                self.rollout = Rollout("training", self.sample())
                self.multipliers.update(self.rollout.rewards.mean(dim=0)[self.controller.constrained].tolist())
            self.applied.append([constraint.threshold for constraint in self.multipliers.constraints])
            self.state.global_step += 1
            self.callback.on_step_end(self.args, self.state, self.control)
            if self.control.should_evaluate:
                self.evaluate()
        return self

    def save(self, folder):
        folder.mkdir(parents=True)
        (folder / "multipliers.json").write_text(json.dumps(self.multipliers.state_dict()))
        self.callback.save(folder)

    def resume(self, other, folder):
        self.means, self.state.global_step = dict(other), int(folder.name.split("-")[1])
        self.state.best_model_checkpoint = str(folder)
        self.multipliers.load_state_dict(json.loads((folder / "multipliers.json").read_text()))
        self.callback.load(folder)
        self.begin()

    def end(self):
        self.callback.on_train_end(self.args, self.state, self.control)


def fake(folder, **settings):
    trainer = FakeTrainer(folder, **{"steps_per_threshold": 20, "rollout_window": 2, **settings})
    trainer.begin()
    return trainer


def test_finds_the_peak(tmp_path):
    trainer = fake(tmp_path, max_gold_evaluations=60, smoothing=0.0).train()  # without noise, averages only blur
    trainer.end()
    found = dict(zip(("intent", "meteor"), trainer.search.named_best()[0], strict=True))
    assert all(abs(found[name] - PEAK[name]) < 0.05 * PEAK[name] for name in PEAK), found
    assert trainer.search.best.gold > 0.998 > trainer.search.initial_gold


def test_every_threshold_goes_to_its_own_reward(tmp_path):
    """Bug 2 of the official code: METEOR was asked for intent's values, for the orders of the two differ."""
    for order in (("intent", "meteor"), ("meteor", "intent")):
        trainer = fake(tmp_path / order[0], order=order, max_gold_evaluations=20).train()
        asked = np.array(trainer.applied)
        assert (np.abs(asked[:, order.index("meteor")] - 0.225) < 0.08).all()
        assert (np.abs(asked[:, order.index("intent")] - 0.48) < 0.17).all()
        assert trainer.search.best.gold > trainer.search.initial_gold
    settings = {"lower": {"meteor": 0.21}, "upper": {"meteor": 0.23, "intent": 0.45}, "max_gold_evaluations": 12}
    trainer = fake(tmp_path / "box", **settings).train()
    asked = np.array(trainer.applied)
    assert (asked[:, 1] >= 0.21).all() and (asked <= [0.45, 0.23]).all()


def test_each_proposal_gets_its_steps_and_the_budget_holds(tmp_path):
    """
    Bug 13: a proposal was scored after one iteration where it began at the wrong one, reached proposals did not
    count, and a run of 100 iterations took up to 141.
    """
    for rate in (0.0, 0.02, 0.5):
        trainer = fake(tmp_path / str(rate), rate=rate, max_gold_evaluations=23, max_steps=170).train()
        trainer.end()
        search = trainer.search
        assert trainer.state.global_step <= 170 and len(trainer.evaluated) <= 23
        assert search.num_gold_evaluations == len(trainer.evaluated)
        for before, trial in zip(search.history, search.history[1:], strict=False):
            assert trial.start_step == before.step
            if trial.source != "cached":
                steps = trial.step - trial.start_step
                assert steps == 20 or (trial.reached and 2 <= steps <= 20) or trial.step == 170
        if not rate:
            assert trainer.state.global_step == 170 and search.num_measured <= 10


def test_budget_ends_the_search(tmp_path):
    trainer = fake(tmp_path, max_gold_evaluations=6, rate=0.5).train()
    assert trainer.search.finished == "budget" and len(trainer.evaluated) == 6
    assert trainer.control.should_training_stop and "max_gold_evaluations" in trainer.stop_reason


def test_a_proposal_is_always_scored_by_an_evaluation_of_its_own(tmp_path):
    """Bug 13: `scores` was unbound where the evaluation interval was longer than a proposal."""
    trainer = fake(tmp_path, rate=0.0, steps_per_threshold=1, rollout_window=5, max_steps=6).train()
    assert trainer.evaluated == [0, 1, 2, 3, 4, 5, 6]
    assert [trial.step for trial in trainer.search.history] == [0, 1, 2, 3, 4, 5, 6]


def test_scores_come_from_the_validation_split(tmp_path):
    """Bug 13: the official code selects on the test split."""
    trainer = fake(tmp_path)
    state = trainer.search.state_dict()
    for prefix in ("test", "predict"):
        trainer.evaluate(prefix)
    assert trainer.search.state_dict() == state and not trainer.control.should_save


def test_samples_of_an_evaluation_are_no_rollout(tmp_path):
    """With several updates on a rollout, steps follow an evaluation before the next rollout."""
    trainer = fake(tmp_path, steps_per_rollout=3, max_gold_evaluations=20)
    sizes = []
    for step in range(1, 25):
        trainer.train(step)
        assert all(max(means) < 5 for means in trainer.search._rollouts)
        sizes.append(len(trainer.search._rollouts))
    assert sizes[:6] == [1, 1, 1, 2, 2, 2] and trainer.search.num_measured > 1


def test_thresholds_stay_in_the_box(tmp_path):
    """Bug 13: reflection and expansion left the range of the rewards."""
    trainer = fake(tmp_path, gold=lambda means, step: sum(means.values()), max_gold_evaluations=60).train()
    asked = np.array(trainer.applied)
    assert (asked <= [0.43 * 1.5 + 1e-12, 0.2 * 1.5 + 1e-12]).all() and asked[:, 0].max() > 0.43 * 1.25
    settings = {"upper": {"intent": 0.5, "meteor": 0.24}, "max_gold_evaluations": 60}
    trainer = fake(tmp_path / "b", gold=lambda means, step: sum(means.values()), **settings).train()
    assert (np.array(trainer.applied) <= [0.5, 0.24]).all()


def test_score_of_a_near_and_reached_proposal_is_reused(tmp_path):
    search = ThresholdSearch(ThresholdSearchConfig(), ["a"], ["=="], 100)
    search.start([1.0], 0.0)
    search.trial.thresholds = [1.2]  # the proposal is set by hand
    search.optimizer._point = search.optimizer.simplex[1] = np.array([1.2])
    search.observe_evaluation(5, [1.21], 1.0)
    assert search._cached(np.array([1.25])).gold == 1.0 and search._cached(np.array([1.27])) is None
    assert search._cached(np.array([1.02])).source == "initial"


def test_unreached_proposals_are_not_reused(tmp_path):
    """Bug 13: the official code caches them too."""
    trainer = fake(tmp_path, rate=0.001, max_gold_evaluations=60, reevaluate_every=0, max_steps=2000).train()
    trials = trainer.search.history
    reached = [trial.thresholds for trial in trials if trial.reached and trial.source != "cached"]
    assert len(reached) < len([trial for trial in trials if trial.source != "cached"])
    for trial in trials:
        if trial.source == "cached":
            assert any(np.allclose(trial.thresholds, known, rtol=0.06) for known in reached)


def test_cache_is_relative_to_the_size_of_a_reward(tmp_path):
    """Bug 13: 0.005 absolute covers all that BLEU, of size 0.003, can take."""
    kept = {}
    for scale in (0.01, 1.0, 100.0):
        trainer = fake(tmp_path / str(scale), scale=scale, max_gold_evaluations=40).train()
        kept[scale] = [(trial.source, trial.step, trial.reached) for trial in trainer.search.history]
        assert trainer.search.best.gold > trainer.search.initial_gold
    assert kept[0.01] == kept[1.0] == kept[100.0]


def test_old_scores_are_measured_again(tmp_path):
    """Bug 13: cached scores were never measured again, though the policy that had them is gone."""

    def falling(means, step):
        return hill(means, step) - 0.02 * step

    for every in (0, 3):
        settings = {"reevaluate_every": every, "cache_lifetime": 3, "max_gold_evaluations": 50, "max_steps": 1000}
        trainer = fake(tmp_path / str(every), gold=falling, **settings).train()
        trials = trainer.search.history
        again = [trial for trial in trials if trial.source == "reevaluated"]
        assert bool(again) == bool(every)
        for trial in trials:
            if trial.source == "cached":
                assert sum(t.source == "measured" for t in trials[: trials.index(trial)]) - trial.measured_at <= 3
    first = trials.index(again[0])
    assert trials[first].thresholds in [trial.thresholds for trial in trials[:first]]
    assert -trainer.search.optimizer.best_value < trainer.search.initial_gold  # not the score of a policy long gone
    trainer = fake(tmp_path / "trusting", gold=falling, reevaluate_every=0, max_gold_evaluations=50, max_steps=1000,
                   on_convergence="stop")  # fmt: skip
    assert -trainer.train().search.optimizer.best_value >= trainer.search.initial_gold


@pytest.mark.parametrize(("rate", "reached"), [(0.5, True), (0.01, False)])
def test_best_thresholds_and_multipliers_are_applied_at_the_end(rate, reached, tmp_path):
    """Bug 13: the official code ends at the last proposal."""
    trainer = fake(tmp_path, max_gold_evaluations=20, rate=rate)
    saved = {}
    while not trainer.control.should_training_stop:
        best = trainer.search.best
        trainer.train(trainer.state.global_step + 1)
        if trainer.search.best is not best:
            assert trainer.control.should_save  # asks the trainer for a checkpoint of every new best policy
            trainer.save(tmp_path / f"checkpoint-{trainer.state.global_step}")
            saved[trainer.state.global_step] = trainer.multipliers.state_dict()
    best = trainer.search.best
    last = trainer.search.history[-1].thresholds
    trainer.state.best_model_checkpoint = str(tmp_path / f"checkpoint-{best.step}")
    trainer.end()
    after = [constraint.threshold for constraint in trainer.multipliers.constraints]
    assert after == best.thresholds and after != last and best.reached == reached
    assert after == best.means or reached  # where it had not come to its thresholds, they would move it on
    assert trainer.multipliers.state_dict()["values"] == saved[best.step]["values"]
    report = json.loads((tmp_path / SEARCH_FILE).read_text())
    assert report["best"]["step"] == best.step and report["finished"] in ("converged", "budget")


def test_evaluation_on_start_is_no_policy_of_the_search(tmp_path):
    """It has no checkpoint that could be applied again; it counts against the budget."""
    trainer = fake(tmp_path, gold=lambda means, step: -step, max_gold_evaluations=10)
    trainer.evaluate()
    assert trainer.search.num_gold_evaluations == 2 and trainer.search.best is None
    assert trainer.train().search.best.step > 0 and len(trainer.evaluated) == 10


def test_training_goes_on_at_the_best_vertex(tmp_path):
    trainer = fake(tmp_path, max_gold_evaluations=12, after_search="train", max_steps=300).train()
    assert trainer.state.global_step == 300 and trainer.search.finished == "budget"
    assert trainer.applied[-1] == trainer.search.named_best()[0]
    assert len(trainer.evaluated) == 12 and trainer.evaluated[-1] == 300


def test_thresholds_of_a_best_policy_that_had_not_reached_its_own(tmp_path):
    trainer = fake(tmp_path, rate=0.01, max_gold_evaluations=20).train()
    best = trainer.search.best
    assert not best.reached and best.thresholds == best.means


@pytest.mark.parametrize("stop", [1, 3, 7, 20, 33, 60, 95])
def test_resumed_in_mid_search_equals_uninterrupted(stop, tmp_path):
    settings = {"max_gold_evaluations": 40, "rate": 0.2, "max_steps": 300}
    whole = fake(tmp_path / "a", **settings).train()
    part = fake(tmp_path / "b", **settings).train(stop)
    checkpoint = tmp_path / "b" / f"checkpoint-{stop}"
    part.save(checkpoint)
    resumed = FakeTrainer(tmp_path / "c", **{"steps_per_threshold": 20, "rollout_window": 2, **settings})
    resumed.resume(part.means, checkpoint)
    resumed.train()
    assert resumed.search.state_dict() == whole.search.state_dict()
    assert (
        resumed.applied == whole.applied[stop:] and resumed.multipliers.state_dict() == whole.multipliers.state_dict()
    )
    assert resumed.evaluated == [step for step in whole.evaluated if step > stop]


def test_a_search_ended_by_its_budget_goes_on_with_a_larger_one(tmp_path):
    part = fake(tmp_path, max_gold_evaluations=6).train()
    checkpoint = tmp_path / f"checkpoint-{part.state.global_step}"
    part.save(checkpoint)
    resumed = FakeTrainer(tmp_path / "c", steps_per_threshold=20, rollout_window=2, max_gold_evaluations=12)
    resumed.resume(part.means, checkpoint)
    assert resumed.search.finished is None
    assert len(resumed.train().search.history) > len(part.search.history)


def test_broken_states_are_refused_and_left_alone(tmp_path):
    part = fake(tmp_path, max_gold_evaluations=20).train(30)
    checkpoint = tmp_path / "checkpoint-30"
    part.save(checkpoint)
    whole = (checkpoint / SEARCH_FILE).read_text()

    def resume(text, match, order=("intent", "meteor")):
        (checkpoint / SEARCH_FILE).write_text(text)
        trainer = FakeTrainer(tmp_path / "c", max_gold_evaluations=20, order=order)
        with pytest.raises(ValueError, match=match):
            trainer.resume(part.means, checkpoint)
        assert (checkpoint / SEARCH_FILE).read_text() == text

    resume(whole[: len(whole) // 2], "not valid JSON.*Resume from another")
    resume("", "not valid JSON")
    resume("[]", "not a whole state")
    resume(json.dumps({key: value for key, value in json.loads(whole).items() if key != "trial"}), "'trial'")
    resume(whole, r"\['intent', 'meteor'\].*\['meteor', 'intent'\]", order=("meteor", "intent"))
    (checkpoint / SEARCH_FILE).unlink()
    trainer = FakeTrainer(tmp_path / "c", max_gold_evaluations=20)
    with pytest.raises(ValueError, match=f"checkpoint-30 has no {SEARCH_FILE}.*with `search`"):
        trainer.callback.load(checkpoint)


def test_best_checkpoint_gone(tmp_path):
    part = fake(tmp_path, max_gold_evaluations=20).train(30)
    part.save(tmp_path / "checkpoint-30")
    trainer = FakeTrainer(tmp_path / "c", max_gold_evaluations=20)
    trainer.callback.load(tmp_path / "checkpoint-30")
    trainer.state.global_step = 30
    with pytest.raises(ValueError, match=f"of step {part.search.best.step} .*is gone"):
        trainer.begin()


def test_interrupted_search_is_not_overwritten(tmp_path):
    fake(tmp_path, max_gold_evaluations=20).train(12).save(tmp_path / "checkpoint-12")
    with pytest.raises(ValueError, match="interrupted.*checkpoint-12.*resume_from_checkpoint"):
        fake(tmp_path)
    finished = fake(tmp_path / "b", max_gold_evaluations=6).train()
    finished.save(tmp_path / "b" / "checkpoint-9")
    finished.end()
    fake(tmp_path / "b")


def test_logged(tmp_path):
    """Bug 3: the official code fails as soon as its simplex is logged."""
    trainer = fake(tmp_path, max_gold_evaluations=10).train()
    assert len(trainer.logged) == len(trainer.search.history)
    assert set(trainer.logged[-1]) == {
        "search/gold", "search/reached", "search/cached", "search/gold_evaluations", "search/proposals",
        "search/best_gold", "search/threshold/intent", "search/threshold/meteor", "search/best_threshold/intent",
        "search/best_threshold/meteor",
    }  # fmt: skip
    assert trainer.logged[-1]["search/gold_evaluations"] == 10
    assert all(type(value) is float for logged in trainer.logged for value in logged.values())


@pytest.mark.parametrize(
    ("kind", "mean", "reached"),
    [("==", 0.96, True), ("==", 0.94, False), ("==", 1.06, False), (">=", 1.5, True), (">=", 0.94, False),
     ("<=", 0.2, True), ("<=", 1.06, False), ("<=", 1.04, True)],
)  # fmt: skip
def test_reached(kind, mean, reached):
    search = ThresholdSearch(ThresholdSearchConfig(), ["a"], [kind], 100)
    search.start([1.0], 0.0)
    assert search._is_reached([mean], [1.0]) == reached
    search = ThresholdSearch(ThresholdSearchConfig(tolerance_scale="range", lower={"a": -1.0}, upper={"a": 1.5}),
                             ["a"], ["=="], 100)  # fmt: skip
    search.start([1.0], 0.0)
    assert search._is_reached([0.1], [0.0]) and not search._is_reached([0.13], [0.0])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_first_simplex(count):
    names = [f"r{index}" for index in range(count)]
    means = [0.5 * (index + 1) * (-1) ** index for index in range(count)]
    search = ThresholdSearch(ThresholdSearchConfig(initial_range=0.4), names, ["=="] * count, 100)
    search.start(means, 0.3)
    offsets = (search.optimizer.simplex - means) / np.abs(means)
    assert (offsets >= -1e-12).all() and (offsets <= 0.4 + 1e-12).all()
    assert np.linalg.matrix_rank(offsets[1:]) == count
    assert search.history[0].source == "initial" and search.history[0].gold == 0.3
    again = ThresholdSearch(ThresholdSearchConfig(initial_range=0.4), names, ["=="] * count, 100)
    again.start(means, 0.3)
    other = ThresholdSearch(ThresholdSearchConfig(initial_range=0.4, seed=1), names, ["=="] * count, 100)
    other.start(means, 0.3)
    assert np.array_equal(again.optimizer.simplex, search.optimizer.simplex)
    assert not np.array_equal(other.optimizer.simplex, search.optimizer.simplex)


def test_given_simplex():
    vertices = [{"a": 1.0, "b": 5.0}, {"b": 6.0, "a": 1.5}, {"a": 2.0, "b": 5.5}]
    search = ThresholdSearch(ThresholdSearchConfig(initial=vertices), ["b", "a"], ["==", "=="], 100)
    search.start([4.0, 0.0], 0.0)
    assert search.optimizer.simplex.tolist() == [[5.0, 1.0], [6.0, 1.5], [5.5, 2.0]] and not search.history
    assert search.optimizer.lower.tolist() == [4.0, 0.0] and search.optimizer.upper.tolist() == [7.0, 3.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("steps", "`search` must be a mapping"),
        ([], "`search` must be a mapping"),
        ({"tolerence": 0.1}, "no setting `tolerence`; did you mean `tolerance`"),
        ({"tolerance": 1.5}, "`search.tolerance` must be a number.* smaller than 1, got 1.5"),
        ({"tolerance": "5e-2"}, "'5e-2'.*reads 5e-2 as text; write 5.0e-2"),
        ({"max_gold_evaluations": 0}, "`search.max_gold_evaluations`.*at least 1, got 0"),
        ({"max_gold_evaluations": 3}, "max_gold_evaluations=3.*first simplex of 2.*at least 4"),
        ({"max_gold_evaluations": 4, "after_search": "train"}, "at least 5"),
        ({"steps_per_threshold": 1.5}, "`search.steps_per_threshold`.*1.5"),
        ({"steps_per_threshold": 0.001}, "0.001` is 0 of the 400 steps"),
        ({"steps_per_threshold": 401}, "is 401 of the 400"),
        ({"after_search": "end"}, r"`search.after_search`.*'stop', 'train'.*'end'"),
        ({"initial_range": -0.1}, "`search.initial_range` must be positive"),
        ({"initial_range": {"meteor": 0.1}}, r"`search.initial_range` must name each of.*intent"),
        ({"lower": {"bleu": 0.1}}, r"`search.lower` names \['bleu'\].*\['intent', 'meteor'\]"),
        ({"lower": 0.1}, "`search.lower` must map reward names to numbers, got 0.1"),
        ({"lower": {"meteor": 0.3}, "upper": {"meteor": 0.2}}, "'meteor', 0.3, must lie below its `upper`, 0.2"),
        ({"lower": {"meteor": 0.9}}, "box of the search is empty.*both"),
        ({"initial": [{"meteor": 0.2, "intent": 0.4}]}, "must have 3 vertices for 2 constraints, got 1"),
        ({"initial": [{"meteor": 0.2}] * 3}, "`search.initial` must name each"),
        ({"initial": [{"meteor": 0.2, "intent": 0.4}] * 3}, "no extent"),
        ({"initial": {}}, "must be a list of vertices"),
        ({"gold_metric": "eval_quality"}, "no .*eval_quality.*eval_gold"),
    ],
)  # fmt: skip
def test_wrong_settings(settings, message, tmp_path):
    def begin():
        trainer = FakeTrainer(tmp_path)
        trainer.callback = ThresholdSearchCallback(trainer, ThresholdSearchConfig.from_dict(settings))
        trainer.begin()

    with pytest.raises(ValueError, match=message):
        begin()


def test_wrong_numbers_and_trainers(tmp_path):
    with pytest.raises(ValueError, match="nan.*finite numbers"):
        fake(tmp_path, gold=lambda means, step: math.nan)
    trainer = fake(tmp_path)
    trainer.gold = lambda means, step: math.inf
    state = trainer.search.state_dict()
    with pytest.raises(ValueError, match="`eval_gold` = inf"):
        trainer.evaluate()
    assert trainer.search.state_dict() == state
    search = ThresholdSearch(ThresholdSearchConfig(), ["a"], ["=="], 100)
    with pytest.raises(RuntimeError, match="before `start`"):
        _ = search.thresholds
    with pytest.raises(ValueError, match="no extent in the rewards.*'a': 0.0.*search.initial"):
        search.start([0.0], 1.0)
    for change, match in (
        ({"multipliers": None}, "there are none"),
        ({"eval_dataset": None}, "validation split"),
        ({"gold_reward": None}, "`gold_reward`"),
        ({"order": ["intent", "intent"]}, "one constraint on each reward"),
    ):
        trainer = FakeTrainer(tmp_path)
        vars(trainer.controller if "order" in change else trainer).update(change)
        with pytest.raises(ValueError, match=match):
            ThresholdSearchCallback(trainer, ThresholdSearchConfig())


def test_without_optuna(monkeypatch, tmp_path):
    """It is told before training starts."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'pip install "trl-ext\[search\]"'):
        FakeTrainer(tmp_path, sampler="tpe")
