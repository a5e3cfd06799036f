"""
A real pretrained model as reward model with an equilibrium head, and constrained PPO on its reward.

First SmolLM2 learns the preferences of short HH dialogues, with transformers' linear head and with equilibrium heads
on the last token or on the mean of all. Then constrained PPO, with an equilibrium critic, trains the same model to
answer HH's questions so that the equilibrium head's reward reaches that of the chosen answers. Finished parts are kept
in `runs.jsonl`, so an interrupted experiment goes on where it stopped.

python -m recipes.experiments.equilibrium_smollm2.run --config recipes/experiments/equilibrium_smollm2/config.yaml \
    --model_name_or_path FOLDER --hh_file DATA/hh_harmless_test.jsonl.gz
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import RewardConfig, RewardTrainer

from trl_ext import (
    ConstrainedPPOConfig,
    ConstrainedPPOTrainer,
    EPModelForSequenceClassification,
    EPRewardConfig,
    EPRewardTrainer,
)
from trl_ext.scripts.recipe.strict_parser import RecipeError, StrictParser, run_strictly

from ..runner import FinishedRuns, markdown_table


console = Console(highlight=False)

ANSWER = "\n\nAssistant:"
LINEAR = "linear, last token"
# Reward model: pooling of its equilibrium head
POOLINGS = {"EP, last token": "last", "EP, mean of tokens": "mean"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class SmolLM2Arguments:
    """
    Arguments of the experiment, beside those of [`ConstrainedPPOConfig`].

    Args:
        model_name_or_path (`str`):
            Model that becomes reward model and policy.
        hh_file (`str`, *optional*):
            Preference pairs (`chosen`, `rejected`: whole dialogues), JSON lines, maybe gzipped.
        reward_models (`list[str]`):
            `LINEAR` and names in `POOLINGS`.
        used_reward (`str`):
            The one that constrained PPO maximises, a name in `POOLINGS`.
        dialogue_tokens (`int`):
            Tokens of the longest dialogue of a pair.
        num_test (`int`):
            Pairs to test on; all others that are short enough train.
        lora_rank, lora_layers (`int`):
            Rank of the adapters; how many of the last layers have one.
        reward_rate (`float`):
            Learning rate of the reward model, adapter and head.
        reward_batch (`int`):
            Pairs of a step.
        reward_epochs (`float`):
            Passes over the pairs.
    """

    model_name_or_path: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Reward model and policy."}
    )
    hh_file: str | None = field(default=None, metadata={"help": "Preference pairs, JSON lines."})
    reward_models: list[str] = field(
        default_factory=lambda: [LINEAR, *POOLINGS], metadata={"help": "Reward models to train."}
    )
    used_reward: str = field(default="EP, mean of tokens", metadata={"help": "The reward of constrained PPO."})
    dialogue_tokens: int = field(default=64, metadata={"help": "Tokens of the longest dialogue of a pair."})
    num_test: int = field(default=100, metadata={"help": "Pairs to test on."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_layers: int = field(default=10, metadata={"help": "How many of the last layers have one."})
    reward_rate: float = field(default=5e-4, metadata={"help": "Learning rate of the reward model."})
    reward_batch: int = field(default=8, metadata={"help": "Pairs of a step of the reward model."})
    reward_epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs."})

    def __post_init__(self) -> None:
        unknown = sorted({*self.reward_models, self.used_reward} - {LINEAR, *POOLINGS})
        if unknown or self.used_reward not in POOLINGS or self.used_reward not in self.reward_models:
            raise ValueError(
                f"`reward_models` is {self.reward_models} and `used_reward` {self.used_reward!r}; the experiment "
                f"knows {[LINEAR, *POOLINGS]}, and uses one of the equilibrium heads that it trains."
            )


def read_pairs(args: SmolLM2Arguments, tokenizer: Any) -> dict[str, Dataset]:
    """Short pairs in a fixed random order, `train` and `test`, with the columns `prompt`, `chosen` and `rejected`."""
    frame = pd.read_json(str(args.hh_file), lines=True).sample(frac=1, random_state=0)
    lengths = [
        max(map(len, tokenizer([chosen, rejected])["input_ids"]))
        for chosen, rejected in zip(frame["chosen"], frame["rejected"], strict=True)
    ]
    rows = []
    for chosen, rejected in frame[["chosen", "rejected"]][
        pd.Series(lengths, frame.index) < args.dialogue_tokens
    ].values:
        end = chosen.rfind(ANSWER) + len(ANSWER)
        if chosen[:end] == rejected[:end]:  # the last answers answer one question
            rows.append({"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]})
    if len(rows) <= args.num_test:
        raise ValueError(
            f"`hh_file` has {len(rows)} pairs below `dialogue_tokens`; the test alone has {args.num_test}."
        )
    return {"train": Dataset.from_list(rows[args.num_test :]), "test": Dataset.from_list(rows[: args.num_test])}


def adapter(args: SmolLM2Arguments, **settings: Any) -> LoraConfig:
    """LoRA on all linear layers of the last blocks."""
    number = AutoConfig.from_pretrained(args.model_name_or_path).num_hidden_layers
    return LoraConfig(
        r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=PROJECTIONS,
        layers_to_transform=list(range(max(0, number - args.lora_layers), number)), **settings,
    )  # fmt: skip


@torch.no_grad()
def rewards_of(model: nn.Module, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Rewards of whole texts, `(N,)`, float32."""
    model.eval()
    parts = []
    for start in range(0, len(texts), 16):
        inputs = tokenizer(texts[start : start + 16], padding=True, return_tensors="pt", return_token_type_ids=False)
        parts.append(model(**inputs).logits[:, 0].float())
    return torch.cat(parts)


def train_reward_model(
    name: str, folder: Path, data: dict[str, Dataset], args: SmolLM2Arguments, seed: int
) -> dict[str, Any]:
    """Trains one reward model, keeps its adapter in `folder` and measures it on the test pairs."""
    start = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    common: dict[str, Any] = {
        "output_dir": str(folder), "learning_rate": args.reward_rate, "per_device_train_batch_size": args.reward_batch,
        "num_train_epochs": args.reward_epochs, "lr_scheduler_type": "cosine", "max_length": args.dialogue_tokens,
        "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "seed": seed, "save_strategy": "no",
        "report_to": "none", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    set_seed(seed)
    if name == LINEAR:
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model_name_or_path, num_labels=1, dtype="float32"
        )
        trainer_class, config = RewardTrainer, RewardConfig(**common)
    else:
        model = EPModelForSequenceClassification.from_pretrained(
            args.model_name_or_path, num_labels=1, dtype="float32", hidden_features=[64, 64], pooling=POOLINGS[name]
        )
        trainer_class, config = EPRewardTrainer, EPRewardConfig(**common)
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = trainer_class(
        model=model, args=config, train_dataset=data["train"], processing_class=tokenizer,
        peft_config=adapter(args, task_type="SEQ_CLS", modules_to_save=["score"]),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(folder)
    chosen, rejected = (
        rewards_of(trainer.model, tokenizer, [row["prompt"] + row[side] + tokenizer.eos_token for row in data["test"]])
        for side in ("chosen", "rejected")
    )
    return {
        "part": name, "pairs": len(data["train"]), "steps": trainer.state.global_step,
        "accuracy": float((chosen > rejected).float().mean()), "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()), "spread": float(torch.cat([chosen, rejected]).std()),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": time.process_time() - start,
    }  # fmt: skip


def train_policy(
    folder: Path, threshold: float, data: dict[str, Dataset], config: ConstrainedPPOConfig, args: SmolLM2Arguments
) -> dict[str, Any]:
    """Constrained PPO towards the threshold on the reward of the model in `folder`, one rollout a point of `curve`."""
    start = time.process_time()
    reward = EPModelForSequenceClassification.from_pretrained(folder).eval()
    reward.config.name_or_path = "equilibrium_reward"
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    own: dict[str, Any] = {"model_init_kwargs": {"dtype": "float32"}}
    own |= {"constraints": [{"reward": "equilibrium_reward", "threshold": threshold}]}
    # What the first construction filled in, and the second would refuse as given
    own |= {"beta": 0.0, "generation_batch_size": None}
    trainer = ConstrainedPPOTrainer(
        args.model_name_or_path, reward_funcs=[reward], reward_processing_classes=[tokenizer],
        args=replace(config, **own), train_dataset=data["train"].select_columns("prompt"),
        peft_config=adapter(args, task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    names = {
        "reward": "rewards/equilibrium_reward/mean",
        "kl": "kl/per_response",
        "weight": "weight/equilibrium_reward",
        "explained_variance": "critic/equilibrium_reward/explained_variance",
    }
    curve = [
        {"step": entry["step"], **{short: float(entry[name]) for short, name in names.items()}}
        for entry in trainer.state.log_history
        if all(name in entry for name in names.values())
    ]
    return {"part": "constrained PPO", "threshold": threshold, "curve": curve, "seconds": time.process_time() - start}


def report(rows: list[dict[str, Any]]) -> str:
    """Both tables, as Markdown."""
    policy = next(row for row in rows if row["part"] == "constrained PPO")
    models = [
        [row["part"], *(f"{row[name]:.2f}" for name in ("accuracy", "chosen", "rejected", "spread")),
         f"{np.mean(row['losses'][-5:]):.3f}", f"{row['seconds']:.0f}"]
        for row in rows if row is not policy
    ]  # fmt: skip
    points = [
        [str(point["step"]), *(f"{point[name]:.2f}" for name in ("reward", "kl", "weight", "explained_variance"))]
        for point in policy["curve"]
    ]
    columns = ["reward model", "test accuracy", "chosen", "rejected", "spread", "training loss at the end", "s"]
    return "\n\n".join(
        [
            markdown_table(columns, models),
            markdown_table(
                ["update", f"reward (threshold {policy['threshold']:.2f})", "KL of a response", "weight of the reward",
                 "explained variance"], points,
            ),
        ]
    )  # fmt: skip


def main(config: ConstrainedPPOConfig, args: SmolLM2Arguments) -> None:
    """Runs what is missing of the experiment and writes `results.md`."""
    if args.hh_file is None:
        raise RecipeError(
            "`hh_file` is missing. Name a file of preference pairs, JSON lines of `chosen` and `rejected`."
        )
    torch.set_num_threads(1)
    finished, output_dir = FinishedRuns(config.output_dir), Path(config.output_dir)
    data = read_pairs(args, AutoTokenizer.from_pretrained(args.model_name_or_path))
    folders = {name: output_dir / f"reward_{place}" for place, name in enumerate(args.reward_models)}
    for name, folder in folders.items():
        if not finished.has(part=name):
            finished.add(train_reward_model(name, folder, data, args, config.seed))
            console.print(finished.rows[-1])
    if not finished.has(part="constrained PPO"):
        threshold = next(row["chosen"] for row in finished.rows if row["part"] == args.used_reward)
        finished.add(train_policy(folders[args.used_reward], threshold, data, config, args))
        console.print(finished.rows[-1])
    (output_dir / "results.md").write_text(report(finished.rows) + "\n")


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((ConstrainedPPOConfig, SmolLM2Arguments))


if __name__ == "__main__":
    run_strictly(make_parser, main)
