# /// script
# dependencies = ["trl-ext"]
# ///
"""
Sample completions of a policy, score them, and write the best and the worst of each prompt as a preference pair.

# With a reward function
python -m trl_ext.scripts.sample_pairs --model outputs/policy --dataset_name playground \
    --reward trl_ext.playground.playground_gold --output_dir outputs/pairs

# With a reward model
python -m trl_ext.scripts.sample_pairs --model outputs/policy --dataset_name trl-lib/ultrafeedback-prompt \
    --reward outputs/reward --num_samples 8 --output_dir outputs/pairs
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from .constrained_ppo import load_reward
from .recipe.usage import description


PAIRS_FILE, SUMMARY_FILE = "pairs.jsonl", "summary.json"
Rows = list[dict[str, Any]]


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Runs the command; returns its exit status."""
    from ..core.quiet import quiet_run

    options = make_parser(prog).parse_args(arguments)
    _check(options)
    with quiet_run():
        rows = prompt_rows(options)
        score = reward_of(options.reward, options.batch_size)
        policy = Policy(options.model, options.max_completion_length, options.temperature)
        pairs, summary = sample_pairs(rows, policy, score, options)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=1))
    partial = folder / f".{PAIRS_FILE}.{os.getpid()}.tmp"
    partial.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    os.replace(partial, folder / PAIRS_FILE)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{summary['pairs']:,} pairs of {summary['prompts']:,} prompts written to {folder / PAIRS_FILE}: mean reward "
        f"{summary['chosen_reward']:.4g} of the chosen and {summary['rejected_reward']:.4g} of the rejected. "
        f"{summary['unfinished']:,} of {summary['samples']:,} completions did not end and were left out, "
        f"{summary['too_close']:,} prompts had no two completions far enough apart."
    )
    return 0


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command's options."""
    parser = argparse.ArgumentParser(
        prog, description=description(__doc__, prog), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", required=True, help="policy: folder or id")
    add("--reward", required=True, help="what scores completions: a function by dotted path, or a reward model")
    add("--output_dir", default="outputs/pairs", help=f"folder for {PAIRS_FILE} and {SUMMARY_FILE}")
    add("--dataset_name", default=None, help="data with a column `prompt`, text or messages; `playground` is made")
    add("--dataset_config", default=None, help="configuration of the data")
    add("--data_files", default=None, help="file of JSON lines, in place of `--dataset_name`")
    add("--dataset_train_split", default="train", help="split of the data")
    add("--num_prompts", type=int, default=1000, help="prompts, from the first on; 0 takes all")
    add("--num_samples", type=int, default=4, help="completions of each prompt, at least 2")
    add("--min_gap", type=float, default=0.0, help="a pair's rewards differ by more than this")
    add("--max_completion_length", type=int, default=256, help="tokens; what has not ended by then is left out")
    add("--temperature", type=float, default=1.0, help="temperature of sampling")
    add("--batch_size", type=int, default=32, help="prompts in a batch")
    add("--seed", type=int, default=0, help="seed of sampling")
    return parser


def _check(options: argparse.Namespace) -> None:
    least = {"num_prompts": 0, "num_samples": 2, "max_completion_length": 1, "batch_size": 1, "min_gap": 0}
    for name, bound in least.items():
        if not getattr(options, name) >= bound:
            raise ValueError(f"`--{name} {getattr(options, name)}` must be at least {bound}.")
    if not options.temperature > 0:
        raise ValueError(f"`--temperature {options.temperature}` must be greater than 0.")
    if (options.dataset_name is None) == (options.data_files is None):
        raise ValueError("Give the prompts: one of `--dataset_name` and `--data_files`.")


def prompt_rows(options: argparse.Namespace) -> Rows:
    """
    The rows with prompts.

    Raises:
        ValueError: If the data has no such split, or no prompts.
    """
    from .recipe.loading import load_datasets, split_of

    wanted = SimpleNamespace(**vars(options), dataset_streaming=False)
    if options.data_files is not None:
        from datasets import load_dataset

        dataset = load_dataset("json", data_files=options.data_files)
    else:
        dataset = load_datasets(wanted, SimpleNamespace(datasets=None))
    split = split_of(dataset, "dataset_train_split", wanted)
    if "prompt" not in split.column_names:
        raise ValueError(f"The data has the columns {split.column_names}, and no `prompt`. Rename one to it.")
    count = min(options.num_prompts or len(split), len(split))
    return split.select(range(count)).to_list()


def reward_of(name: str, batch_size: int) -> Callable[..., list[float]]:
    """
    The scoring function of a dotted path, or of a reward model.

    Args:
        name (`str`):
            Dotted path, folder or id.
        batch_size (`int`):
            Texts that a reward model reads at once.

    Returns:
        `Callable`, called as TRL's reward functions are: `prompts`, `completions` and the data's columns.
    """
    found = load_reward(name, "reward")
    return found if callable(found) else _RewardModel(name, batch_size)


class Policy:
    """
    A policy that samples, by itself on the GPU where there is one.

    Args:
        name (`str`):
            Folder or id.
        max_completion_length (`int`):
            Most tokens of a completion.
        temperature (`float`):
            Temperature.
    """

    def __init__(self, name: str, max_completion_length: int, temperature: float):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        from .recipe.loading import resolve_model

        name = resolve_model(name)
        self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", truncation_side="left")
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError(f"The tokenizer of {name} has no `eos_token`, so that no completion ends. Give it one.")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        stated = self.model.generation_config.eos_token_id
        self.ends = {eos, *(stated if isinstance(stated, list) else [stated] if stated is not None else [])}
        # The policy's own distribution: no repetition penalty, no truncation that the model's authors recommend
        self.model.generation_config = GenerationConfig(
            do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_completion_length,
            pad_token_id=self.tokenizer.pad_token_id, eos_token_id=sorted(self.ends),
        )  # fmt: skip

    def sample(self, prompts: Sequence[Any], num_samples: int) -> list[list[str | None]]:
        """
        Samples completions.

        Args:
            prompts (`Sequence[str | list[dict]]`):
                Prompts, text or messages.
            num_samples (`int`):
                Completions of each.

        Returns:
            `list[list[str | None]]`: the completions of each prompt; `None` for one that did not end.
        """
        import torch

        texts = [prompt if isinstance(prompt, str) else self._templated(prompt) for prompt in prompts]
        special = isinstance(prompts[0], str)  # a template brings its own
        inputs = self.tokenizer(
            texts, padding=True, return_tensors="pt", return_token_type_ids=False, add_special_tokens=special
        ).to(self.model.device)
        with torch.no_grad():
            output = self.model.generate(**inputs, num_return_sequences=num_samples)
        rows = output[:, inputs["input_ids"].size(1) :].tolist()
        found = [
            self.tokenizer.decode(row, skip_special_tokens=True) if self.ends & set(row) else None for row in rows
        ]
        return [found[start : start + num_samples] for start in range(0, len(found), num_samples)]

    def _templated(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


class _RewardModel:
    """A sequence classifier with one label as a reward function, reading texts as TRL's online trainers let it."""

    def __init__(self, name: str, batch_size: int):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from ..constrained_ppo.reward_lengths import keep_within_positions
        from ..equilibrium import register_auto_classes

        register_auto_classes()
        self.batch_size = batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model: Any = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, dtype="auto").eval()
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        keep_within_positions(self.model, name)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        import torch

        plain = isinstance(prompts[0], str)
        pairs = list(zip(prompts, completions, strict=True))
        texts = [p + c if plain else self.tokenizer.apply_chat_template(p + c, tokenize=False) for p, c in pairs]
        found: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(
                texts[start : start + self.batch_size], padding=True, padding_side="right", return_tensors="pt",
                return_token_type_ids=False, add_special_tokens=False,
            ).to(self.model.device)  # fmt: skip
            with torch.no_grad():
                found += self.model(**inputs).logits[:, 0].float().tolist()
        return found


def sample_pairs(
    rows: Rows, policy: Any, score: Callable[..., list[float]], options: argparse.Namespace
) -> tuple[Rows, dict[str, Any]]:
    """
    The best and the worst of several completions of each prompt.

    Args:
        rows (`list[dict]`):
            Rows with `prompt`, and columns that the reward takes.
        policy (`Policy`):
            Policy.
        score (`Callable`):
            Reward function.
        options (`argparse.Namespace`):
            Options of the command.

    Returns:
        `tuple[list[dict], dict]`: pairs with `prompt`, `chosen` and `rejected`, and counts and means.

    Raises:
        ValueError: If no prompt gave a pair.
    """
    import torch

    torch.manual_seed(options.seed)
    pairs: Rows = []
    rewards: list[tuple[float, float]] = []
    counts = {"prompts": len(rows), "samples": len(rows) * options.num_samples, "unfinished": 0}
    for start in range(0, len(rows), options.batch_size):
        batch = rows[start : start + options.batch_size]
        sampled = policy.sample([row["prompt"] for row in batch], options.num_samples)
        ended = [(row, text) for row, texts in zip(batch, sampled, strict=True) for text in texts if text is not None]
        counts["unfinished"] += len(batch) * options.num_samples - len(ended)
        scores = _scores([row for row, _ in ended], [text for _, text in ended], score) if ended else []
        for row in batch:
            scored = zip(ended, scores, strict=True)
            own = [(value, text) for (of, text), value in scored if of is row and value is not None]
            best = max(own, key=lambda pair: pair[0], default=(0.0, ""))
            worst = min(own, key=lambda pair: pair[0], default=(0.0, ""))
            if best[0] - worst[0] > options.min_gap:
                completions = {"chosen": _completion(row, best[1]), "rejected": _completion(row, worst[1])}
                pairs.append({"prompt": row["prompt"], **completions})
                rewards.append((best[0], worst[0]))
    if not pairs:
        raise ValueError(
            f"No prompt of {len(rows)} gave two completions that ended and whose rewards differ by more than "
            f"{options.min_gap} ({counts['unfinished']} of {counts['samples']} completions did not end). Raise "
            "`--max_completion_length`, `--num_samples` or `--temperature`, or lower `--min_gap`."
        )
    means = [sum(side) / len(rewards) for side in zip(*rewards, strict=True)]
    summary = {"pairs": len(pairs), **counts, "too_close": len(rows) - len(pairs)}
    return pairs, {**summary, "chosen_reward": means[0], "rejected_reward": means[1], "reward": options.reward}


def _completion(row: dict[str, Any], text: str) -> Any:
    return text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]


def _scores(rows: Rows, texts: list[str], score: Callable[..., list[float]]) -> list[float]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    completions = [_completion(row, text) for row, text in zip(rows, texts, strict=True)]
    return score(prompts=columns.pop("prompt"), completions=completions, **columns)


if __name__ == "__main__":
    sys.exit(main())
