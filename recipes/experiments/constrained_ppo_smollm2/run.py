"""
Over-optimisation of a real pretrained model: GRPO on openings of IMDB reviews with two rewards that can be hacked,
with and without constraints, judged by a metric that no run trains on.

Every completion that is trained on is judged, each time on prompts that the run has not seen before, and the base
model's log-probabilities come from the run's own KL: the gold metric costs no forward. Finished runs are kept in
`runs.jsonl`, so an interrupted experiment goes on where it stopped.

python -m recipes.experiments.constrained_ppo_smollm2.run --model_name_or_path FOLDER --imdb_dir DATA/imdb \
    --config recipes/experiments/constrained_ppo_smollm2/config.yaml
"""

import itertools
import json
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trl_ext import ConstrainedGRPOConfig, ConstrainedGRPOTrainer
from trl_ext.scripts.recipe.strict_parser import RecipeError, StrictParser, run_strictly

from ..adapted_model import AdaptedModelArguments
from ..runner import FinishedRuns
from .gold import Judge, mean_surprisals
from .report import write_report
from .sentiment import SentimentScore, clean, distinct_share, prepare


REWARDS = ("sentiment_score", "distinct_share")
# Means over updates 9 to 12, where the gold metric was highest, of a run of GRPO on a seed that is not reported
THRESHOLDS = (0.56, 0.93)
QUESTION = " ... This movie is"


@dataclass
class SmolArguments(AdaptedModelArguments):
    """
    Arguments of the experiment, beside those of [`AdaptedModelArguments`].

    Args:
        imdb_dir (`str`, *optional*):
            Folder with `imdb_train.parquet` and `imdb_test.parquet` (columns `text`, `label`).
        model_name_or_path (`str`):
            Model that is trained.
        arms (`list[str]`):
            Methods, of `ARMS`.
        seeds (`list[int]`):
            Seeds of training.
    """

    imdb_dir: str | None = field(default=None, metadata={"help": "Folder with the IMDB parquet files."})
    model_name_or_path: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Model that is trained."}
    )
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "Methods."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of training."})


class ObservedGRPOTrainer(GRPOTrainer):
    """TRL's trainer, which keeps what the loss was computed on: text and surprisal of every completion."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "observed"):
            self.observed: list[dict[str, Any]] = []
        if model.training:
            mask = inputs["completion_mask"]
            texts = self.processing_class.batch_decode(inputs["completion_ids"] * mask, skip_special_tokens=True)
            surprisals = mean_surprisals(inputs["ref_per_token_logps"], mask)
            self.observed += [
                {"step": self.state.global_step, "completion": text, "surprisal": round(surprisal, 3)}
                for text, surprisal in zip(texts, surprisals, strict=True)
            ]
        return super().compute_loss(model, inputs, *args, **kwargs)


class ObservedConstrainedGRPOTrainer(ObservedGRPOTrainer, ConstrainedGRPOTrainer):
    """The trainer with constraints, observed."""


def _constrained(**settings: Any) -> dict[str, Any]:
    return {"method": "xi", "beta": 0.04, "calibration_samples": 0, "dashboard": False, **settings}


# The share of words that are no repetitions is wanted high, and not at a value: the constraint is a lower bound
_HELD = [
    {"reward": REWARDS[0], "threshold": THRESHOLDS[0]},
    {"reward": REWARDS[1], "threshold": THRESHOLDS[1], "kind": ">="},
]
_EQUAL = [{**constraint, "kind": "=="} for constraint in _HELD]
# Trainer, configuration and settings of each method
ARMS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "GRPO": (ObservedGRPOTrainer, GRPOConfig, {}),
    "GRPO, KL coefficient 0.04": (ObservedGRPOTrainer, GRPOConfig, {"beta": 0.04}),
    "constrained GRPO (xi)": (
        ObservedConstrainedGRPOTrainer,
        ConstrainedGRPOConfig,
        _constrained(constraints=_HELD),
    ),
    "constrained GRPO (xi), both equalities": (
        ObservedConstrainedGRPOTrainer,
        ConstrainedGRPOConfig,
        _constrained(constraints=_EQUAL),
    ),
}
# What keeps the trainer's log of a constrained run readable
_WEIGHTS = ("weight/", "multiplier/", "filtered_violation/", "spread/")


def review_openings(imdb_dir: str, words: int) -> Dataset:
    """The first words of every unused review, those of the test split, and what asks for a judgement."""
    texts = pd.read_parquet(Path(imdb_dir) / "imdb_test.parquet")["text"]
    return Dataset.from_dict({"prompt": [" ".join(clean(text).split()[:words]) + QUESTION for text in texts]})


def train(arm: str, seed: int, config: Any, arguments: SmolArguments, folder: Path) -> dict[str, Any]:
    """
    Trains once.

    Returns:
        `dict` with `arm`, `seed`, `curve` (for each update the KL of a response in nats and the means of the
        rewards), `observed` (step, text, surprisal and judged sentiment of each completion) and the seconds it took.
    """
    trainer_class, config_class, settings = ARMS[arm]
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.init}
    given |= {"generation_batch_size": None, "seed": seed, "model_init_kwargs": {"dtype": "float32"}, **settings}
    torch.manual_seed(seed)
    trainer = trainer_class(
        model=arguments.model_name_or_path,
        reward_funcs=[SentimentScore(folder), distinct_share],
        args=config_class(**given),
        train_dataset=review_openings(str(arguments.imdb_dir), arguments.prompt_words),
        peft_config=arguments.adapter(arguments.model_name_or_path),
    )
    start, cpu_start = time.monotonic(), time.process_time()
    trainer.train()
    seconds = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu_start}
    logged = [entry for entry in trainer.state.log_history if f"rewards/{REWARDS[0]}/mean" in entry]
    positive = Judge(folder).positive([row["completion"] for row in trainer.observed])
    frame = pd.DataFrame(trainer.observed).assign(positive=positive)
    curve = [
        {
            "step": entry["step"],
            "kl": kl_of_response(entry),
            **{name: entry[f"rewards/{name}/mean"] for name in REWARDS},
        }
        for entry in logged
    ]
    log = [{name: round(value, 4) for name, value in e.items() if name.startswith(_WEIGHTS)} for e in logged]
    kept = {"curve": curve, "log": log, "observed": frame.to_dict("records")}
    return {"arm": arm, "seed": seed, "steps": len(curve), **kept, **seconds}


def kl_of_response(entry: dict[str, float]) -> float:
    """KL of a response from the base model in nats, from a log entry of either trainer."""
    if "kl/per_response" in entry:
        return entry["kl/per_response"]
    return entry["kl"] * entry["completions/mean_length"]


def main(training_args: GRPOConfig, arguments: SmolArguments) -> None:
    """Runs what is missing and writes the report into the output folder."""
    if arguments.imdb_dir is None:
        raise RecipeError("`imdb_dir` is missing. Name the folder of `imdb_train.parquet` and `imdb_test.parquet`.")
    folder = Path(training_args.output_dir)
    finished = FinishedRuns(folder)
    facts = folder / "facts.json"
    if not facts.is_file():
        facts.write_text(json.dumps(prepare(arguments.imdb_dir, folder)))
    for seed, arm in itertools.product(arguments.seeds, arguments.arms):
        if not finished.has(arm=arm, seed=seed):
            finished.add(train(arm, seed, training_args, arguments, folder))
    write_report([run for run in finished.rows if run["seed"] in arguments.seeds], folder)


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((GRPOConfig, SmolArguments))


if __name__ == "__main__":
    run_strictly(make_parser, main)
