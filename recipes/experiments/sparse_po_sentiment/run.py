"""
The paper's sentiment experiment at the scale of one machine: reward against KL of DPO, TDPO1, TDPO2, MaPO and
SparsePO, over values of beta and seeds.

A language model is tuned on IMDB, a classifier of sentiment is trained on IMDB's labels, pairs are sampled from the
language model and ordered by the classifier, and every method is trained on the same pairs. Finished runs are kept in
`runs.jsonl`, so an interrupted experiment goes on where it stopped.

python -m recipes.experiments.sparse_po_sentiment.run --config recipes/experiments/sparse_po_sentiment/config.yaml \
    --imdb_dir DATA/imdb --odpo_file DATA/odpo_imdb_gpt2large_scored.jsonl.gz --model_name_or_path DATA/stories260k
"""

import itertools
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from trl import ModelConfig

from trl_ext import SparsePOConfig, SparsePOTrainer
from trl_ext.scripts.recipe.strict_parser import StrictParser, run_strictly
from trl_ext.sparse_po.evaluation import RewardAndDivergence, reward_and_divergence

from ..runner import FinishedRuns, markdown_table
from .report import Frontier, draw_frontiers


logger = get_logger(__name__)

METHODS: dict[str, dict[str, Any]] = {
    "DPO": {"mask_type": "ones", "divergence_coef": 0.0},
    "TDPO1": {"mask_type": "ones"},
    "TDPO2": {"mask_type": "ones", "divergence_coef": 0.5, "detach_chosen_divergence": True},
    "MaPO": {"mask_type": "activation"},
    "SparsePO common": {"mask_type": "learned"},
    "SparsePO independent": {"mask_type": "learned", "independent_masks": True},
}


@dataclass
class FrontierArguments:
    """
    Arguments of the experiment.

    Args:
        imdb_dir (`str`):
            Folder with `imdb_train.parquet`, `imdb_test.parquet` and `imdb_unsup.parquet` (columns `text`, `label`).
        odpo_file (`str`, *optional*):
            JSON lines `{prompt, text, reward}`; the first two texts of each prompt are pairs to evaluate on.
        betas (`list[float]`):
            Values of beta.
        seeds (`list[int]`):
            Seeds of training.
        tuning_steps (`int`):
            Steps of tuning the language model on IMDB; 0 takes the model as it is.
        num_pairs (`int`):
            Pairs sampled from the language model.
        num_prompts (`int`):
            Held-out prompts in an evaluation.
        new_tokens (`int`):
            Length of the samples in tokens.
        prompt_words (`int`):
            Words of a review that make a prompt.
    """

    imdb_dir: str = field(metadata={"help": "Folder with the IMDB parquet files."})
    odpo_file: str | None = field(default=None, metadata={"help": "Scored responses to evaluate preferences on."})
    betas: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.3, 0.8], metadata={"help": "Values of beta."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of training."})
    tuning_steps: int = field(default=600, metadata={"help": "Steps of tuning the language model on IMDB."})
    num_pairs: int = field(default=1600, metadata={"help": "Pairs sampled from the language model."})
    num_prompts: int = field(default=256, metadata={"help": "Held-out prompts in an evaluation."})
    new_tokens: int = field(default=48, metadata={"help": "Length of the samples in tokens."})
    prompt_words: int = field(default=5, metadata={"help": "Words of a review that make a prompt."})


class SentimentClassifier(torch.nn.Module):
    """Logistic regression on the words of a text; its probability of positive is the reward."""

    def __init__(self, words: list[str]):
        super().__init__()
        self.index = {word: position for position, word in enumerate(words)}
        self.weights = torch.nn.EmbeddingBag(len(words) + 1, 1, mode="mean", padding_idx=len(words))
        self.scale = torch.nn.Parameter(torch.tensor(20.0))
        torch.nn.init.zeros_(self.weights.weight)

    def encode(self, text: str, limit: int = 400) -> torch.Tensor:
        ids = [self.index[word] for word in _words(text)[:limit] if word in self.index]
        return torch.tensor(ids or [len(self.index)])

    def forward(self, encoded: list[torch.Tensor]) -> torch.Tensor:
        offsets = torch.tensor([0, *np.cumsum([len(ids) for ids in encoded[:-1]])], dtype=torch.long)
        return self.scale * self.weights(torch.cat(encoded), offsets).squeeze(-1)

    @torch.no_grad()
    def reward(self, completions: list[str], prompts: list[str] | None = None, **columns: Any) -> list[float]:
        """Probability of positive sentiment of each completion: a TRL reward function."""
        return torch.sigmoid(self([self.encode(text) for text in completions])).tolist()


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.replace("<br />", " ").lower())


def train_classifier(
    imdb_dir: str, epochs: int = 4, vocabulary_size: int = 20000
) -> tuple[SentimentClassifier, float]:
    """Trains the classifier on IMDB's training labels; returns it with its accuracy on the test reviews."""
    train, test = (pd.read_parquet(Path(imdb_dir) / f"imdb_{split}.parquet") for split in ("train", "test"))
    counts = Counter(word for text in train["text"] for word in set(_words(text)))
    classifier = SentimentClassifier([word for word, _ in counts.most_common(vocabulary_size)])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.05)
    encoded = [classifier.encode(text) for text in train["text"]]
    labels = torch.tensor(train["label"].to_numpy(), dtype=torch.float32)
    for _ in range(epochs):
        for rows in torch.randperm(len(encoded), generator=generator).split(256):
            logits = classifier([encoded[row] for row in rows])
            torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    positive = np.array(classifier.reward(test["text"].tolist())) > 0.5
    return classifier, float((positive == test["label"].to_numpy()).mean())


def tune_language_model(name: str, imdb_dir: str, steps: int, folder: Path, length: int = 128) -> float:
    """Tunes a language model on the unlabelled reviews, saves it with its tokenizer, returns the final loss."""
    set_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch_size = 32
    texts = pd.read_parquet(Path(imdb_dir) / "imdb_unsup.parquet")["text"].sample(frac=1, random_state=0)
    ids = []
    for text in texts:
        ids += tokenizer(text.replace("<br />", " "))["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) >= max(1, steps) * batch_size * length:
            break
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 50, max(1, steps))
    losses = []
    for step in range(steps):
        batch = rows[torch.arange(step * batch_size, (step + 1) * batch_size) % len(rows)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return float(np.mean(losses[-50:])) if losses else float("nan")


def review_prompts(imdb_dir: str, split: str, num_prompts: int, words: int) -> list[str]:
    """The first words of reviews, a different review for each prompt."""
    texts = pd.read_parquet(Path(imdb_dir) / f"imdb_{split}.parquet")["text"].sample(num_prompts, random_state=1)
    return [" ".join(text.replace("<br />", " ").split()[:words]) for text in texts]


def sample_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, classifier: SentimentClassifier,
    arguments: FrontierArguments, minimum_gap: float = 0.05,
) -> list[dict[str, str]]:  # fmt: skip
    """Two samples for each prompt, ordered by the classifier, where they differ by `minimum_gap` or more."""
    prompts = review_prompts(arguments.imdb_dir, "train", 2 * arguments.num_pairs, arguments.prompt_words)
    drawn = [
        reward_and_divergence(
            model, model, tokenizer, prompts, classifier.reward, max_new_tokens=arguments.new_tokens, batch_size=256,
            seed=seed,
        )
        for seed in (1, 2)
    ]  # fmt: skip
    rows = []
    for index, prompt in enumerate(prompts):
        (low_reward, low), (high_reward, high) = sorted((d.rewards[index], d.completions[index]) for d in drawn)
        if high_reward - low_reward >= minimum_gap and low.strip() and high.strip():
            rows.append({"prompt": prompt, "chosen": " " + high.strip(), "rejected": " " + low.strip()})
    if len(rows) < arguments.num_pairs:
        logger.warning(f"Only {len(rows)} pairs differ by {minimum_gap} in reward.")
    return rows[: arguments.num_pairs]


def odpo_pairs(path: str, max_words: int = 40) -> list[dict[str, str]]:
    """The first two texts of every prompt, cut to `max_words`; the one with the higher reward is chosen."""
    rows = []
    for prompt, group in pd.read_json(path, lines=True).groupby("prompt", sort=False):
        first = group.head(2).sort_values("reward")
        rejected, chosen = (" " + " ".join(t[len(prompt) :].split()[:max_words]) for t in first["text"])
        if len(first) == 2 and rejected.strip() and chosen.strip() and rejected != chosen:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def prepare(arguments: FrontierArguments, model_name: str, folder: Path) -> dict[str, Any]:
    """Makes, once, what all runs share: language model, classifier and pairs; returns facts about them."""
    facts_file = folder / "facts.json"
    if facts_file.is_file():
        return json.loads(facts_file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    classifier, accuracy = train_classifier(arguments.imdb_dir)
    torch.save(classifier, folder / "classifier.pt")
    loss = tune_language_model(model_name, arguments.imdb_dir, arguments.tuning_steps, folder / "policy")
    model = AutoModelForCausalLM.from_pretrained(folder / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    pairs = sample_pairs(model, tokenizer, classifier, arguments)
    base = measure(model, model, tokenizer, classifier, arguments)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    facts = {
        "classifier_accuracy": accuracy,
        "language_model_loss": loss,
        "parameters": sum(p.numel() for p in model.parameters()),
        "pairs": len(pairs),
        "base_reward": base.mean_reward,
        "seconds": time.monotonic() - start,
    }
    facts_file.write_text(json.dumps(facts, indent=1))
    return facts


def measure(
    policy: Any, reference: Any, tokenizer: Any, classifier: SentimentClassifier, arguments: FrontierArguments
) -> RewardAndDivergence:
    """Reward and KL of one sample for each held-out prompt."""
    prompts = review_prompts(arguments.imdb_dir, "test", arguments.num_prompts, arguments.prompt_words)
    return reward_and_divergence(
        policy, reference, tokenizer, prompts, classifier.reward, max_new_tokens=arguments.new_tokens, batch_size=256
    )


def run(
    method: str, beta: float, seed: int, config: SparsePOConfig, arguments: FrontierArguments, folder: Path
) -> dict[str, Any]:
    """Trains one method and measures it on held-out prompts."""
    settings = {**METHODS[method], "beta": beta, "seed": seed, "output_dir": str(folder / "last_run")}
    if settings["mask_type"] != "learned":
        settings["mask_learning_rate"] = None
    config = replace(config, **{f.name: settings[f.name] for f in fields(config) if f.name in settings})
    evaluation = odpo_pairs(arguments.odpo_file) if arguments.odpo_file else None
    trainer = SparsePOTrainer(
        str(folder / "policy"),
        args=config,
        train_dataset=Dataset.from_list(json.loads((folder / "pairs.json").read_text())),
        eval_dataset=Dataset.from_list(evaluation) if evaluation else None,
    )
    start = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - start
    classifier = torch.load(folder / "classifier.pt", weights_only=False)
    measured = measure(trainer.model, trainer.ref_model, trainer.processing_class, classifier, arguments)
    logged = [entry for entry in trainer.state.log_history if "mask/reward/mean" in entry][-1]
    result = {
        "method": method, "beta": beta, "seed": seed, "reward": measured.mean_reward,
        "divergence": measured.mean_divergence, "seconds": seconds,
        "sparsity_reward": logged["mask/reward/sparsity_chosen"],
        "sparsity_divergence": logged["mask/divergence/sparsity_chosen"],
    }  # fmt: skip
    if evaluation:
        result["odpo_accuracy"] = trainer.evaluate()["eval_rewards/accuracies"]
    return result


def report(runs: list[dict[str, Any]], facts: dict[str, Any], folder: Path) -> str:
    """Writes the table (returned, Markdown) and the plot of reward against KL."""
    columns = ["method", "beta", "reward", "KL", "sparsity m_u / m_d", "accuracy on ODPO pairs", "seeds"]
    rows = []
    frontiers: dict[str, Frontier] = {}
    for method in METHODS:
        points: Frontier = []
        for beta in sorted({run["beta"] for run in runs}):
            chosen = [run for run in runs if run["method"] == method and run["beta"] == beta]
            if not chosen:
                continue
            mean = {key: np.mean([run[key] for run in chosen if key in run]) for key in chosen[0] if key != "method"}
            spread = {key: np.std([run[key] for run in chosen]) for key in ("reward", "divergence")}
            points.append((mean["divergence"], mean["reward"], spread["divergence"], spread["reward"], beta))
            cells = [
                f"{mean['reward']:.3f} ± {spread['reward']:.3f}",
                f"{mean['divergence']:.2f} ± {spread['divergence']:.2f}",
                f"{mean['sparsity_reward']:.2f} / {mean['sparsity_divergence']:.2f}",
                f"{mean.get('odpo_accuracy', float('nan')):.3f}",
            ]
            rows.append([method, str(beta), *cells, str(len(chosen))])
        if points:
            frontiers[method] = points
    draw_frontiers(frontiers, folder / "sentiment_frontier.png")
    table = markdown_table(columns, rows)
    (folder / "sentiment_frontier.md").write_text(f"{table}\n\nShared by all runs: `{json.dumps(facts)}`\n")
    return table


def main(training_args: SparsePOConfig, model_args: ModelConfig, arguments: FrontierArguments) -> None:
    """Runs what is missing of the grid and writes the report into the output folder."""
    folder = Path(training_args.output_dir)
    facts = prepare(arguments, model_args.model_name_or_path, folder)
    finished = FinishedRuns(folder)
    for seed, beta, method in itertools.product(arguments.seeds, arguments.betas, METHODS):
        if finished.has(method=method, beta=beta, seed=seed):
            continue
        finished.add(run(method, beta, seed, training_args, arguments, folder))
        report(finished.rows, facts, folder)


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((SparsePOConfig, ModelConfig, FrontierArguments))


if __name__ == "__main__":
    run_strictly(make_parser, main)
