"""
The paper's dialogue experiment at reduced size: METEOR and intent accuracy as rewards, its evaluation score as the
gold metric, and PPO, PPO-SAT, All-PPO, mu-PPO and xi-PPO over seeds.

The score is min-max normalised over the runs on each reward alone, which therefore come first.

python -m recipes.experiments.constrained_ppo_dailydialog.run \
    --config recipes/experiments/constrained_ppo_dailydialog/config.yaml --dialog_dir DATA/dialog
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import load_dataset

from trl_ext import ConstrainedPPOConfig
from trl_ext.scripts.recipe.strict_parser import RecipeError, StrictParser, run_strictly

from ..method_comparison import ComparisonArguments, Task, alone, compare
from ..runner import FinishedRuns
from .evaluation import evaluation_score, lexical_metrics, ranges_of
from .prepare import POLICY, SPLITS, prepare
from .rewards import CLASSIFIER_VARIABLE, intent_match, meteor


RANGES = "ranges.json"


@dataclass
class DialogArguments(ComparisonArguments):
    """
    Arguments of the experiment, beside those of [`ComparisonArguments`].

    Args:
        dialog_dir (`str`):
            Folder of XDailyDialog's English files.
        experiment_dir (`str`):
            Folder of policy, classifier, splits and results.
        num_prompts (`int`):
            Contexts of one evaluation.
        policy_steps (`int`):
            Optimizer steps of the dialogue model.
    """

    dialog_dir: str | None = field(default=None, metadata={"help": "Folder of XDailyDialog's English files."})
    experiment_dir: str = field(default="outputs/dailydialog", metadata={"help": "Folder of the experiment."})
    num_prompts: int = field(default=256, metadata={"help": "Contexts of one evaluation."})
    policy_steps: int = field(default=2000, metadata={"help": "Optimizer steps of the dialogue model."})


class EvaluationScore:
    """
    The evaluation score as a gold metric: that of all replies of a call, for each of them.

    Args:
        ranges (`dict`, *optional*):
            Range of each measure. Without it the score is 0 and the measures are only kept.
    """

    def __init__(self, ranges: dict[str, list[float]] | None):
        self.ranges = ranges
        self.measured: list[dict[str, float]] = []

    def __call__(self, completions: list[Any], reference: list[str], **columns: Any) -> list[float]:
        self.measured.append(lexical_metrics(completions, reference))
        score = 0.0 if self.ranges is None else evaluation_score(self.measured[-1], self.ranges)
        return [score] * len(completions)


def dialog_task(arguments: DialogArguments) -> Task:
    """The policy, contexts with references and intents, both rewards and the score."""
    folder = Path(arguments.experiment_dir)
    os.environ[CLASSIFIER_VARIABLE] = str(folder)
    files = {name: str(folder / f"{name}.jsonl") for name in SPLITS}
    data = load_dataset("json", data_files=files)
    held_out = {name: data[name].select(range(min(arguments.num_prompts, len(data[name])))) for name in SPLITS[1:]}
    ranges = json.loads((folder / RANGES).read_text()) if (folder / RANGES).is_file() else None
    return Task(
        model=str(folder / POLICY),
        train=data["train"],
        validation=held_out["validation"],
        test=held_out["test"],
        rewards=(meteor, intent_match),
        gold=EvaluationScore(ranges),
    )


def normalise(folder: Path, reward_names: list[str]) -> list[dict[str, Any]]:
    """
    Takes the range of each measure from the runs on each reward alone, writes it, and gives every run whose score
    was not known its score.
    """
    finished = FinishedRuns(folder)
    own = [result for result in finished.rows if result["name"] in {alone(name) for name in reward_names}]
    ranges = ranges_of([point["measures"] for result in own for point in result["curve"]])
    (folder / RANGES).write_text(json.dumps(ranges, indent=1))
    for result in finished.rows:
        for point in (*result["curve"], result["test"]):
            point["gold"] = evaluation_score(point["measures"], ranges)
    finished.rewrite()
    return finished.rows


def main(training_args: ConstrainedPPOConfig, arguments: DialogArguments) -> None:
    """Runs what is missing and writes the report into the experiment's folder."""
    if arguments.dialog_dir is None:
        raise RecipeError("`dialog_dir` is missing. Name the folder of XDailyDialog's English files.")
    folder = Path(arguments.experiment_dir)
    prepare(arguments.dialog_dir, folder, arguments.policy_steps)
    compare(dialog_task, arguments, training_args, folder, "evaluation score", normalise)


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((ConstrainedPPOConfig, DialogArguments))


if __name__ == "__main__":
    run_strictly(make_parser, main)
