"""The threshold search in a trainer: it is told of rollouts and evaluations, and sets the thresholds it asks for."""

import math
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from ...core.files import warn_of_failure
from ..checkpoint import MULTIPLIERS_FILE, read_json, write_json
from .config import ThresholdSearchConfig
from .search import ThresholdSearch, Trial
from .tree_parzen import require_optuna


SEARCH_FILE = "threshold_search.json"
_REMEDY = "Resume from a checkpoint of a run with `search` and the same constraints."
_ENDS = {
    "budget": "`max_gold_evaluations` is spent",
    "converged": "the simplex is within `cache_tolerance` of its best vertex",
    "steps": "the run has no more steps",
    "stopped": "the run was ended",
}
logger = get_logger(__name__)


class ThresholdSearchCallback(TrainerCallback):
    """
    Moves the thresholds of a [`ConstrainedPPOTrainer`] by Nelder-Mead while it trains (NM-PPO). Only the trainer's own
    evaluation is used; metrics of another prefix are ignored. At the end the trainer loads the policy of highest gold
    metric (`load_best_model_at_end`, which `search` turns on), and this callback the multipliers and thresholds that
    belong to it.
    """

    def __init__(self, trainer: Any, config: ThresholdSearchConfig):
        self.trainer, self.config = trainer, config
        if trainer.multipliers is None:
            raise ValueError("`search` moves the thresholds of constraints, and there are none. Give `constraints`.")
        self.names = trainer.controller.constrained_names()
        config.check_rewards(self.names)
        if trainer.eval_dataset is None:
            raise ValueError("`search` evaluates on a validation split. Give the trainer an `eval_dataset`.")
        if config.gold_metric == "eval_gold" and trainer.gold_reward is None:
            raise ValueError(
                "`search` maximises `eval_gold`, and there is no gold metric. Give the trainer a `gold_reward`, or "
                "name another evaluation metric as `search.gold_metric`."
            )
        if config.sampler == "tpe":
            require_optuna()
        self.search: ThresholdSearch | None = None
        self._loaded: tuple[Path, dict[str, Any]] | None = None
        self._seen_rollout: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seen_rollout = self.trainer.rollout
        kinds = [constraint.kind for constraint in self.trainer.controller.constraints]
        self.search = ThresholdSearch(self.config, self.names, kinds, state.max_steps)
        if self._loaded is not None:
            self._restore(state)
            self._stop_where_finished(control)
            return
        if state.global_step:
            raise ValueError(
                f"The run is resumed at step {state.global_step}, and no {SEARCH_FILE} was loaded. Resume from a "
                "checkpoint of a run with `search`."
            )
        self._refuse_to_overwrite(Path(args.output_dir))
        self.trainer.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.search is not None
        rollout = self.trainer.rollout
        if rollout.purpose == "training" and rollout is not self._seen_rollout:
            self._seen_rollout = rollout
            self.search.observe_rollout(rollout.rewards.mean(dim=0)[self.trainer.controller.constrained].tolist())
        if self.search.wants_evaluation(state.global_step):
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if self.search is None or not any(key.startswith("eval_") for key in metrics):
            return
        means, gold = self._read(metrics)
        if not self.search.started:
            self.search.start(means, gold)
            self._apply(state, self.search.history)
            return
        best = self.search.best
        scored = self.search.observe_evaluation(state.global_step, means, gold)
        if self.search.best is not best:
            control.should_save = True
        if scored:
            self._apply(state, scored)
        self._stop_where_finished(control)

    def _stop_where_finished(self, control: Any) -> None:
        assert self.search is not None
        if self.search.finished and self.config.after_search == "stop":
            self.trainer.end_training(f"The threshold search has ended: {_ENDS[self.search.finished]}.")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.search is not None
        self.search.finished = self.search.finished or "stopped"
        best = self.search.best
        if best is not None:
            checkpoint = state.best_model_checkpoint
            if checkpoint is not None and self.trainer.multipliers is not None:
                self.trainer.multipliers.load_state_dict(read_json(checkpoint, MULTIPLIERS_FILE, _REMEDY))
            self._set_thresholds(best.thresholds)
            if best.gold <= self.search.initial_gold:
                logger.warning(
                    f"No policy of the search has a better gold metric than the one before training: {best.gold:.4g} "
                    f"against {self.search.initial_gold:.4g}."
                )
        self._write_report(state)

    def _read(self, metrics: dict[str, float]) -> tuple[list[float], float]:
        keys = [*(f"eval_rewards/{name}/mean" for name in self.names), self.config.gold_metric]
        missing = [key for key in keys if key not in metrics]
        if missing:
            raise ValueError(
                f"The evaluation gave no {missing}, which the threshold search needs. It gave {sorted(metrics)}. Set "
                "`search.gold_metric` to one of them, or give the trainer a `gold_reward`."
            )
        values = [float(metrics[key]) for key in keys]
        if self.trainer.args.world_size > 1:
            values = broadcast_object_list([values])[0]
        return values[:-1], values[-1]

    def _apply(self, state: Any, scored: list[Trial]) -> None:
        """Sets the thresholds of the next proposal, logs those scored, and writes the report."""
        assert self.search is not None
        self._set_thresholds(self.search.thresholds)
        for trial in scored:
            self.trainer.log(self._logged(trial))
        self._write_report(state)

    def _logged(self, trial: Trial) -> dict[str, float]:
        search = self.search
        assert search is not None and search.optimizer is not None and trial.gold is not None
        logged = {
            "search/gold": trial.gold,
            "search/reached": float(trial.reached),
            "search/cached": float(trial.source == "cached"),
            "search/gold_evaluations": float(search.num_gold_evaluations),
            "search/proposals": float(len(search.history)),
        }
        best, score = search.named_best()
        if math.isfinite(score):
            logged["search/best_gold"] = score
        for name, threshold, best_threshold in zip(self.names, trial.thresholds, best, strict=True):
            logged[f"search/threshold/{name}"] = threshold
            logged[f"search/best_threshold/{name}"] = best_threshold
        return logged

    def _write_report(self, state: Any) -> None:
        if state.is_world_process_zero:
            with warn_of_failure(f"{SEARCH_FILE} could not be written"):
                self.save(self.trainer.args.output_dir)

    def _refuse_to_overwrite(self, folder: Path) -> None:
        checkpoints = sorted(path.parent.name for path in folder.glob(f"checkpoint-*/{SEARCH_FILE}"))
        finished = (folder / SEARCH_FILE).is_file() and read_json(folder, SEARCH_FILE, _REMEDY)["finished"]
        if not checkpoints or finished:
            return
        raise ValueError(
            f"`output_dir` {folder} holds a threshold search that was interrupted ({', '.join(checkpoints)}). Go on "
            "with `resume_from_checkpoint`, or choose another `output_dir`; nothing was changed."
        )

    def _restore(self, state: Any) -> None:
        assert self.search is not None and self._loaded is not None
        path, saved = self._loaded
        self._loaded = None
        try:
            self.search.load_state_dict(saved)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{path} is not a whole state of a threshold search ({type(error).__name__}: {error}). Resume from "
                "another checkpoint."
            ) from error
        best = self.search.best
        if best is not None and state.best_model_checkpoint is None:
            raise ValueError(
                f"The best policy of the search so far, of step {best.step} with a gold metric of {best.gold:.4g}, is "
                "gone: its checkpoint is not where the saved run had it. Put the folder back, or start a new search "
                "in another `output_dir`."
            )
        self.search.reopen(state.global_step)
        if self.search.thresholds != [constraint.threshold for constraint in self.trainer.controller.constraints]:
            self._set_thresholds(self.search.thresholds)

    def _set_thresholds(self, thresholds: list[float]) -> None:
        controller = self.trainer.controller
        controller.set_constraints(
            [one.with_threshold(value) for one, value in zip(controller.constraints, thresholds, strict=True)]
        )

    def save(self, folder: str | Path) -> None:
        """Writes the state of the search to a folder, whole or not at all."""
        if self.search is not None:
            write_json(Path(folder), SEARCH_FILE, self.search.state_dict())

    def load(self, folder: str | Path) -> None:
        """Reads the state that the next [`~transformers.Trainer.train`] goes on from."""
        self._loaded = Path(folder) / SEARCH_FILE, read_json(folder, SEARCH_FILE, _REMEDY)
