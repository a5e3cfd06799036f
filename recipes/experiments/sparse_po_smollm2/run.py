"""
Reward against KL of DPO, TDPO1, TDPO2, MaPO and SparsePO on a pretrained model, SmolLM2-135M-Instruct, with as many
runs for the tuning of each; on IMDB sentiment, or on the harmless part of HH.

    sentiment   pairs of responses (ODPO's, of GPT-2-large), ordered by a classifier of words trained on IMDB's labels;
                reward: its P(positive) of samples of the policy
    harmless    pairs of last turns; reward: accuracy of the implicit reward on held-out pairs

A step and an evaluation are timed first, and what all runs will take is printed; `only_size` stops there, and
`max_minutes` starts no run after that time. Finished runs are kept in `runs.jsonl`, so an interrupted experiment goes
on where it stopped. The layers below the adapter run once for each batch, for both models and all runs of a seed.

python -m recipes.experiments.sparse_po_smollm2.run --config recipes/experiments/sparse_po_smollm2/config.yaml \
    --model_name_or_path FOLDER --imdb_dir DATA/imdb --pairs_file DATA/odpo_imdb_gpt2large_scored.jsonl.gz
"""

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from rich.console import Console
from trl import ModelConfig

from trl_ext import SparsePOConfig, SparsePOTrainer
from trl_ext.core.companion import base_policy
from trl_ext.scripts.recipe.strict_parser import RecipeError, StrictParser, run_strictly
from trl_ext.sparse_po.evaluation import mask_recovery, reward_and_divergence
from trl_ext.sparse_po.reference_pass import decoder_layers
from trl_ext.sparse_po.report import TokenMaskCallback

from ..adapted_model import AdaptedModelArguments
from ..runner import FinishedRuns
from ..sparse_po_sentiment.run import METHODS, review_prompts, train_classifier
from .frozen_layers import FrozenLayerCache
from .report import write_report


console = Console()
TASKS = ("sentiment", "harmless")
LEXICON = "opinion_lexicon/{}-words.txt"


@dataclass
class SmolArguments(AdaptedModelArguments):
    """
    Arguments of the experiment, beside those of [`AdaptedModelArguments`].

    Args:
        task (`str`):
            `"sentiment"` or `"harmless"`.
        pairs_file (`str`, *optional*):
            JSON lines: `{prompt, text, reward}` for sentiment, `{chosen, rejected}` dialogues for harmless.
        imdb_dir (`str`, *optional*):
            Sentiment only: folder with `imdb_train.parquet` and `imdb_test.parquet` (columns `text`, `label`).
        lexicon_file (`str`, *optional*):
            Zip of the opinion lexicon, with which the masks are compared.
        methods (`list[str]`):
            Methods, of `METHODS`.
        betas (`list[float]`):
            Values of beta.
        seeds (`list[int]`):
            Seeds of training.
        learning_rate_factors (`list[float]`):
            Factors on the learning rate that each method is tuned over, at the middle beta and on a seed that is not
            reported; one factor means no tuning.
        tuning_max_kl (`float`):
            The tuning takes the highest reward among the runs whose KL is at most so many nats per response, so that
            no method is set to a rate at which it over-optimises.
        num_pairs (`int`):
            Pairs to train on.
        num_held_out (`int`):
            Prompts (of sentiment) or pairs (of harmless) to evaluate on; masks are shown on held-out pairs.
        max_words (`int`):
            Words that responses are cut to.
        max_prompt_words (`int`):
            Harmless only: longest dialogue before the answer, in words; longer ones are left out.
        new_tokens (`int`):
            Length of the samples in tokens.
        only_size (`bool`):
            Whether to print what the runs will take, and stop.
        max_minutes (`float`, *optional*):
            Starts no run after so many minutes.
    """

    task: str = field(default="sentiment", metadata={"help": "'sentiment' or 'harmless'."})
    pairs_file: str | None = field(default=None, metadata={"help": "JSON lines with the pairs."})
    imdb_dir: str | None = field(default=None, metadata={"help": "Folder with the IMDB parquet files."})
    lexicon_file: str | None = field(default=None, metadata={"help": "Zip of the opinion lexicon."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods."})
    betas: list[float] = field(default_factory=lambda: [0.05, 0.2, 0.8], metadata={"help": "Values of beta."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of training."})
    learning_rate_factors: list[float] = field(
        default_factory=lambda: [0.3, 1.0, 3.0], metadata={"help": "Factors that each method is tuned over."}
    )
    tuning_max_kl: float = field(default=10.0, metadata={"help": "Largest KL that the tuning may choose, in nats."})
    num_pairs: int = field(default=800, metadata={"help": "Pairs to train on."})
    num_held_out: int = field(default=128, metadata={"help": "Pairs and prompts to evaluate on."})
    max_words: int = field(default=30, metadata={"help": "Words that responses are cut to."})
    max_prompt_words: int = field(default=40, metadata={"help": "Longest dialogue before the answer, in words."})
    new_tokens: int = field(default=32, metadata={"help": "Length of the samples in tokens."})
    only_size: bool = field(default=False, metadata={"help": "Print what the runs will take, and stop."})
    max_minutes: float | None = field(default=None, metadata={"help": "Start no run after so many minutes."})


@dataclass(frozen=True)
class Run:
    """One training run: method, beta, seed, factor on the learning rate, and whether it is of the tuning."""

    method: str
    beta: float
    seed: int
    factor: float
    tuning: bool


def scored_pairs(path: str, max_words: int, reward: Callable[[list[str]], list[float]]) -> list[dict[str, Any]]:
    """Of each prompt's texts, cut to `max_words`, the best with the worst, the second with the second worst, ..."""
    rows = []
    for prompt, group in pd.read_json(path, lines=True).groupby("prompt", sort=False):
        texts = [" " + " ".join(text[len(prompt) :].split()[:max_words]) for text in group["text"]]
        scored = sorted(zip(reward(texts), texts, strict=True))
        for (low, rejected), (high, chosen) in zip(scored[: len(scored) // 2], reversed(scored), strict=False):
            if rejected.strip() and high > low:
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "gap": high - low})
    return rows


def dialogue_pairs(path: str, max_words: int, max_prompt_words: int) -> list[dict[str, Any]]:
    """Dialogues, cut before the last turn of the assistant, where both have the same few words before it."""
    mark = "\n\nAssistant:"
    rows = []
    for pair in pd.read_json(path, lines=True).to_dict("records"):
        prompt, _, chosen = pair["chosen"].rpartition(mark)
        other, _, rejected = pair["rejected"].rpartition(mark)
        answers = [" " + " ".join(text.split()[:max_words]) for text in (chosen, rejected)]
        short = len(prompt.split()) <= max_prompt_words
        if short and prompt == other and answers[0].strip() and answers[1].strip() and answers[0] != answers[1]:
            rows.append({"prompt": prompt + mark, "chosen": answers[0], "rejected": answers[1]})
    return rows


def make_pairs(arguments: SmolArguments, classifier: Any) -> tuple[Dataset, Dataset]:
    """Pairs to train on and held-out pairs, which share no prompt; those first whose rewards differ most."""
    if arguments.task == "sentiment":
        rows = scored_pairs(str(arguments.pairs_file), arguments.max_words, classifier.reward)
    else:
        rows = dialogue_pairs(str(arguments.pairs_file), arguments.max_words, arguments.max_prompt_words)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    order = np.random.default_rng(0).permutation(len(prompts))
    held_out_prompts = {prompts[i] for i in order[: max(1, len(prompts) // 5)]}
    rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    rows = sorted(rows, key=lambda row: -row.pop("gap", 0.0))
    held_out = [row for row in rows if row["prompt"] in held_out_prompts][: arguments.num_held_out]
    train = [row for row in rows if row["prompt"] not in held_out_prompts][: arguments.num_pairs]
    return Dataset.from_list(train), Dataset.from_list(held_out)


def make_trainer(
    run: Run, config: SparsePOConfig, model: str, arguments: SmolArguments, pairs: tuple[Dataset, Dataset],
    cache: FrozenLayerCache,
) -> SparsePOTrainer:  # fmt: skip
    """The trainer of one run: an adapter on the last layers, the model without it as reference."""
    settings: dict[str, Any] = {**METHODS[run.method], "beta": run.beta, "seed": run.seed}
    settings["learning_rate"] = config.learning_rate * run.factor
    if settings["mask_type"] != "learned":
        settings["mask_learning_rate"] = None
    config = replace(config, **{f.name: settings[f.name] for f in fields(config) if f.name in settings})
    trainer = SparsePOTrainer(
        model, args=config, train_dataset=pairs[0], eval_dataset=pairs[1], peft_config=arguments.adapter(model)
    )
    # Activation masks observe what happens inside the reference's layers
    cache.attach(decoder_layers(base_policy(trainer.model)), while_no_grad=config.mask_type != "activation")
    return trainer


def evaluate(trainer: SparsePOTrainer, arguments: SmolArguments, classifier: Any) -> dict[str, Any]:
    """Reward and KL on what is held out, with the standard error of the reward."""
    if arguments.task == "harmless":
        found = trainer.evaluate()
        accuracy = found["eval_rewards/accuracies"]
        error = (accuracy * (1 - accuracy) / len(trainer.eval_dataset)) ** 0.5
        return {"reward": accuracy, "divergence": found["eval_kl/chosen"], "reward_error": error}
    prompts = review_prompts(str(arguments.imdb_dir), "test", arguments.num_held_out, arguments.prompt_words)
    measured = reward_and_divergence(
        trainer.model, None, trainer.processing_class, prompts, classifier.reward,
        max_new_tokens=arguments.new_tokens, batch_size=128,
    )  # fmt: skip
    reward_error, divergence_error = measured.standard_errors
    return {
        "reward": measured.mean_reward, "divergence": measured.mean_divergence, "reward_error": reward_error,
        "divergence_error": divergence_error, "example": measured.completions[0],
    }  # fmt: skip


def lexicon_words(path: str) -> set[str]:
    """Words of the opinion lexicon, positive and negative."""
    from zipfile import ZipFile

    with ZipFile(path) as file:
        text = "\n".join(file.read(LEXICON.format(kind)).decode("latin-1") for kind in ("positive", "negative"))
    return {line.strip() for line in text.splitlines() if line.strip() and not line.startswith(";")}


def tokens_of_words(pieces: list[str], words: set[str]) -> np.ndarray:
    """Which of the tokens, given by their texts in order, are part of one of the words."""
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = ends - [len(piece) for piece in pieces]
    inside = np.zeros(len(pieces), dtype=bool)
    for match in re.finditer(r"[a-z'-]+", "".join(pieces).lower()):
        if match.group() in words:
            inside |= (starts < match.end()) & (ends > match.start())
    return inside


def agreement(trainer: SparsePOTrainer, words: set[str], num_pairs: int = 24) -> float:
    """Chance that a token of a word of the lexicon weighs more than another, in held-out responses."""
    texts = itertools.chain.from_iterable(TokenMaskCallback(trainer, num_pairs).weighted_pairs())
    weights, truth = [], []
    for text in texts:
        if "divergence" in text.title:
            continue
        scored = np.isfinite(text.weights)
        weights.append(np.asarray(text.weights)[scored])
        truth.append(tokens_of_words(text.pieces, words)[scored])
    return mask_recovery(weights, truth).auc


def train(
    run: Run, config: SparsePOConfig, model: str, arguments: SmolArguments, pairs: tuple[Dataset, Dataset],
    classifier: Any, cache: FrozenLayerCache,
) -> dict[str, Any]:  # fmt: skip
    """Trains once; returns the run's row."""
    start = time.process_time()
    trainer = make_trainer(run, config, model, arguments, pairs, cache)
    shown = run.seed == arguments.seeds[0] and run.beta == middle(arguments.betas) and not run.tuning
    if shown and trainer.args.mask_type != "ones":
        pictures = Path(config.output_dir) / "token_masks" / run.method.replace(" ", "_")
        trainer.add_callback(TokenMaskCallback(trainer, 3, pictures, console))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "mask/reward/mean" in entry][-1]
    row = {**vars(run), **evaluate(trainer, arguments, classifier)}
    for mask in ("reward", "divergence"):
        row[f"sparsity_{mask}"] = logged[f"mask/{mask}/sparsity_chosen"]
        row[f"mean_{mask}"] = logged[f"mask/{mask}/mean"]
    if arguments.lexicon_file and trainer.args.mask_type != "ones":
        row["lexicon_auc"] = agreement(trainer, lexicon_words(arguments.lexicon_file))
    return {**row, "cpu_seconds": time.process_time() - start}


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def tuning_runs(arguments: SmolArguments) -> list[Run]:
    """As many runs for each method, on a seed that is not reported."""
    if len(arguments.learning_rate_factors) < 2:
        return []
    seed, beta = max(arguments.seeds) + 1, middle(arguments.betas)
    return [Run(m, beta, seed, factor, True) for factor in arguments.learning_rate_factors for m in arguments.methods]


def best_of_tuning(rows: list[dict[str, Any]], max_kl: float) -> dict[str, Any]:
    """The row of the highest reward at a KL of at most `max_kl`; the row of the lowest KL where all are above."""
    near = [row for row in rows if row["divergence"] <= max_kl]
    return max(near, key=lambda row: row["reward"]) if near else min(rows, key=lambda row: row["divergence"])


def reported_runs(arguments: SmolArguments, rows: list[dict[str, Any]]) -> Iterator[Run]:
    """The grid, the middle beta first, with each method's best factor by [`best_of_tuning`]."""
    factors = dict.fromkeys(arguments.methods, arguments.learning_rate_factors[0])
    for method in arguments.methods:
        tuned = [row for row in rows if row["tuning"] and row["method"] == method]
        if tuned:
            factors[method] = best_of_tuning(tuned, arguments.tuning_max_kl)["factor"]
    betas = sorted(arguments.betas, key=lambda beta: beta != middle(arguments.betas))
    for seed, beta, method in itertools.product(arguments.seeds, betas, arguments.methods):
        yield Run(method, beta, seed, factors[method], False)


def size(
    config: SparsePOConfig, model: str, arguments: SmolArguments, pairs: tuple[Dataset, Dataset], classifier: Any,
    cache: FrozenLayerCache,
) -> dict[str, Any]:  # fmt: skip
    """Times a step of learned masks and an evaluation, of the model itself, and says what all runs will take."""
    run = Run("SparsePO common", arguments.betas[0], 0, 1.0, True)
    start = time.process_time()
    trainer = make_trainer(run, config, model, arguments, pairs, cache)
    seconds = [time.process_time() - start]
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    for _ in range(2):  # the first one fills the cache
        start = time.process_time()
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch))).backward()
        seconds.append(time.process_time() - start)
    start = time.process_time()
    found = evaluate(trainer, arguments, classifier)
    seconds.append(time.process_time() - start)
    accumulated = config.gradient_accumulation_steps
    num_tuning = len(tuning_runs(arguments))
    runs = num_tuning + len(arguments.seeds) * len(arguments.betas) * len(arguments.methods)
    minutes = runs * (seconds[0] + config.max_steps * accumulated * seconds[2] + seconds[3]) / 60
    return {
        "reward of the model itself": round(found["reward"], 3), "its standard error": round(found["reward_error"], 3),
        "runs": runs, "tuning runs of each method": num_tuning // len(arguments.methods),
        "steps of a run": config.max_steps, "pairs of a step": config.per_device_train_batch_size * accumulated,
        "CPU seconds to load": round(seconds[0], 2), "of a step": round(seconds[2], 2),
        "of an evaluation": round(seconds[3], 1), "CPU minutes of all runs": round(minutes, 1),
    }  # fmt: skip


def prepare(
    config: SparsePOConfig, model: str, arguments: SmolArguments, cache: FrozenLayerCache
) -> tuple[Any, tuple[Dataset, Dataset], dict[str, Any]]:
    """Classifier, pairs, and what all runs share; this is measured once and kept in the folder."""
    torch.manual_seed(0)
    classifier, accuracy = None, float("nan")
    kept = Path(config.output_dir) / "classifier.pt"
    if arguments.task == "sentiment":
        if not kept.is_file():
            torch.save(train_classifier(str(arguments.imdb_dir)), kept)
        classifier, accuracy = torch.load(kept, weights_only=False)
    pairs = make_pairs(arguments, classifier)
    file = Path(config.output_dir) / "facts.json"
    if file.is_file():
        facts = json.loads(file.read_text())
    else:
        facts = {"pairs": len(pairs[0]), "held-out pairs": len(pairs[1])}
        facts |= {"accuracy of the classifier": round(accuracy, 3)} if classifier else {}
        facts |= size(config, model, arguments, pairs, classifier, cache)
        file.write_text(json.dumps(facts))
    console.print("Size: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    return classifier, pairs, facts


def main(training_args: SparsePOConfig, model_args: ModelConfig, arguments: SmolArguments) -> None:
    """Runs what is missing and writes the report into the output folder."""
    if arguments.task not in TASKS:
        raise RecipeError(f"`task` must be one of {TASKS}, got {arguments.task!r}.")
    if not arguments.methods or not set(arguments.methods) <= set(METHODS):
        raise RecipeError(f"`methods` must be some of {tuple(METHODS)}, got {arguments.methods}.")
    if arguments.pairs_file is None or (arguments.task == "sentiment" and arguments.imdb_dir is None):
        raise RecipeError("Give `pairs_file`, and for the sentiment task `imdb_dir`.")
    began, folder, model = time.monotonic(), Path(training_args.output_dir), model_args.model_name_or_path
    finished, cache = FinishedRuns(folder), FrozenLayerCache()
    classifier, pairs, facts = prepare(training_args, model, arguments, cache)
    if arguments.only_size:
        return

    def lazily() -> Iterator[Run]:  # the tuning's outcome is known once it has run
        yield from tuning_runs(arguments)
        yield from reported_runs(arguments, finished.rows)

    for run in lazily():
        if finished.has(**vars(run)):
            continue
        if arguments.max_minutes is not None and time.monotonic() - began > 60 * arguments.max_minutes:
            console.print(f"{arguments.max_minutes:g} minutes are over; the same command goes on from here.")
            break
        finished.add(train(run, training_args, model, arguments, pairs, classifier, cache))
        console.print({name: value for name, value in finished.rows[-1].items() if name != "example"})
        if not run.tuning:
            write_report(finished.rows, facts, arguments.task, folder)


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((SparsePOConfig, ModelConfig, SmolArguments))


if __name__ == "__main__":
    run_strictly(make_parser, main)
