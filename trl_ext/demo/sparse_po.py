"""The demo's first part: SparsePO, MaPO, TDPO and DPO on pairs whose sentiment-bearing tokens are known."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..core.figures import line_style, new_axes, save_figure
from ..playground import grammaticality, preference_dataset, prompts, resolve, sentiment_reward, token_truth
from .work import Part, Task


# In the order of the table
METHODS: dict[str, list[str]] = {
    "SparsePO common": [],
    "SparsePO independent": ["--independent_masks", "True"],
    "MaPO": ["--mask_type", "activation", "--mask_learning_rate", "0"],
    "TDPO1": ["--mask_type", "ones", "--mask_learning_rate", "0"],
    "DPO": ["--mask_type", "ones", "--mask_learning_rate", "0", "--divergence_coef", "0"],
}
NUM_STEPS = 120
# Of the recipe, in every method: half its batch, three checkpoints, no pictures
OVERRIDES = ["--per_device_train_batch_size", "16", "--save_steps", "40", "--show_token_masks", "0"]
NUM_PROMPTS = 256


@dataclass
class MethodResult:
    """
    What one method reached.

    Attributes:
        name (`str`): Method.
        points (`list[tuple[float, float]]`): KL and reward at each checkpoint.
        accuracy (`float`): Share of test pairs whose chosen response has the higher implicit reward.
        sparsity (`tuple[float, float]`): Share of zero weights of the reward and of the divergence mask.
        auc (`tuple[float, float]`): How well each mask finds the sentiment-bearing tokens.
        grammaticality (`float`): Share of grammatical sentences in the samples of the last checkpoint.
    """

    name: str
    points: list[tuple[float, float]] = field(default_factory=list)
    accuracy: float = float("nan")
    sparsity: tuple[float, float] = (0.0, 0.0)
    auc: tuple[float, float] = (0.5, 0.5)
    grammaticality: float = float("nan")


def sparse_po_part(output_dir: Path, config: str, console: Console, max_steps: int | None = None) -> Part:
    """
    Trains and compares the methods of [`METHODS`], prints one table and draws reward against KL and a pair's masks.

    Args:
        output_dir (`Path`):
            Folder; each method has its own below it, and the pictures are `frontier.png` and `token_masks.png`.
        config (`str`):
            Recipe.
        console ([`~rich.console.Console`]):
            Console to print on.
        max_steps (`int`, *optional*):
            Steps of each method, to try it quickly.

    Returns:
        [`Part`], which shows a list of [`MethodResult`] in the order of [`METHODS`].
    """
    folders = {name: output_dir / name.lower().replace(" ", "_") for name in METHODS}
    last = str(NUM_STEPS if max_steps is None else max_steps)
    steps = ["--max_steps", last, "--eval_steps", last]  # one evaluation, at the end
    tasks = [Task("base model", output_dir / "base_model.log", measure_base)]
    for name, folder in folders.items():
        overrides = [*METHODS[name], *OVERRIDES, *steps]
        tasks.append(Task(name, folder.with_suffix(".log"), train_and_measure, (name, folder, config, overrides)))

    def show(found: list[Any]) -> list[MethodResult]:
        base, *results = found
        for result in results:
            result.points.insert(0, base)
        console.print(results_table(results))
        draw_frontier(results, output_dir / "frontier.png")
        draw_pair(folders["SparsePO common"], output_dir / "token_masks.png")
        (output_dir / "results.json").write_text(json.dumps([vars(result) for result in results], indent=1))
        pictures = f"{output_dir / 'frontier.png'} and {output_dir / 'token_masks.png'}"
        console.print(f"Pictures: {pictures}.", soft_wrap=True)
        return results

    return Part("SparsePO and its relatives", tasks, show)


def train_and_measure(name: str, folder: Path, config: str, overrides: list[str]) -> MethodResult:
    """Trains one method as the recipe says and measures it."""
    from ..scripts.sparse_po import main, make_parser

    shutil.rmtree(folder, ignore_errors=True)  # checkpoints of an earlier demo
    main(*make_parser().parse_args_and_config(["--config", config, "--output_dir", str(folder), *overrides]))
    return measure(name, folder)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, in order."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def measure_base() -> tuple[float, float]:
    """KL and reward of the base model."""
    return measure_policies([Path(resolve("playground"))])[0][0]


def measure_policies(paths: list[Path]) -> tuple[list[tuple[float, float]], list[str]]:
    """KL and reward of saved policies, and the completions of the last one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..sparse_po.evaluation import reward_and_divergence

    reference = AutoModelForCausalLM.from_pretrained(resolve("playground")).eval()
    tokenizer = AutoTokenizer.from_pretrained(resolve("playground"))
    points = []
    for path in paths:
        measured = reward_and_divergence(
            AutoModelForCausalLM.from_pretrained(path).eval(), reference, tokenizer,
            prompts(NUM_PROMPTS, split="test"), sentiment_reward, max_new_tokens=56, batch_size=NUM_PROMPTS,
        )  # fmt: skip
        points.append((measured.mean_divergence, measured.mean_reward))
    return points, measured.completions


def measure(name: str, folder: Path) -> MethodResult:
    """Measures a finished run: every checkpoint on the frontier, the masks against the truth."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..sparse_po.evaluation import mask_recovery

    reference = AutoModelForCausalLM.from_pretrained(resolve("playground")).eval()
    tokenizer = AutoTokenizer.from_pretrained(resolve("playground"))
    result = MethodResult(name)
    result.points, completions = measure_policies(checkpoints(folder))
    result.grammaticality = float(np.mean(grammaticality(completions)))
    state = json.loads((checkpoints(folder)[-1] / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_rewards/accuracies" in entry]
    result.accuracy = evaluations[-1]["eval_rewards/accuracies"]
    weights, truth = zip(*weighted_test_responses(folder, reference, tokenizer), strict=True)
    by_term = [[w[term] for w in weights] for term in (0, 1)]
    result.sparsity = (
        float(np.mean(np.concatenate(by_term[0]) == 0)),
        float(np.mean(np.concatenate(by_term[1]) == 0)),
    )
    result.auc = (mask_recovery(by_term[0], list(truth)).auc, mask_recovery(by_term[1], list(truth)).auc)
    return result


def weighted_test_responses(
    folder: Path, reference, tokenizer, num_pairs: int = 100
) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], np.ndarray]]:
    """For test responses, the weights of both masks and the sentiment of each token."""
    from ..sparse_po.evaluation import mask_weights

    masks = run_masks(folder)
    pairs = preference_dataset(num_pairs, split="test")
    for row in pairs:
        for side in ("chosen", "rejected"):
            inputs = response_inputs(tokenizer, row["prompt"], row[side] + tokenizer.eos_token)
            completion = inputs["completion_mask"][0, 1:].bool()
            weights = tuple(mask[0][completion].numpy() for mask in mask_weights(masks, reference, inputs))
            yield weights, np.array([*token_truth(row[side]), 0.0])  # type: ignore[misc]


def run_masks(folder: Path):
    """The masks of a finished run of the demo."""
    from ..sparse_po.masks import TOKEN_MASKS_FILE, TokenMasks, restore_masks

    if (folder / TOKEN_MASKS_FILE).is_file():
        return restore_masks(folder)
    return TokenMasks(1, 1, "activation" if folder.name == "mapo" else "ones")


def response_inputs(tokenizer, prompt: str, response: str) -> dict[str, torch.Tensor]:
    """One prompt and response as a batch of one row."""
    ids = tokenizer(prompt + response, return_tensors="pt", return_token_type_ids=False)["input_ids"]
    completion = torch.ones_like(ids)
    completion[:, : len(tokenizer(prompt)["input_ids"])] = 0
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}


def results_table(results: list[MethodResult]) -> Table:
    """The results as one table."""
    table = Table(
        title=f"SparsePO on the playground ({NUM_PROMPTS} sampled responses, 200 test pairs)",
        caption="reward: exact sentiment; KL(policy || reference), nats per response; preference: accuracy on test "
        "pairs; sparsity: share of zero weights; AUC: how well a mask finds the sentiment-bearing tokens (0.5 is "
        "chance)",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    columns = ("method", "reward", "KL", "gram-\nmatical", "prefe-\nrence", "sparsity\nm_u / m_d",
               "AUC\nm_u / m_d")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    divergence, reward = results[0].points[0]
    table.add_row("base model", f"{reward:.3f}", f"{divergence:.2f}", "", "", "", "", end_section=True)
    for result in results:
        divergence, reward = result.points[-1]
        table.add_row(
            result.name,
            f"{reward:.3f}",
            f"{divergence:.2f}",
            f"{result.grammaticality:.3f}",
            f"{result.accuracy:.3f}",
            " / ".join(f"{value:.2f}" for value in result.sparsity),
            " / ".join(f"{value:.2f}" for value in result.auc),
        )
    return table


def draw_frontier(results: list[MethodResult], path: Path) -> None:
    """Reward against KL of every checkpoint of every method."""
    figure, (axes,) = new_axes(width=8, height=5.2, dpi=140)
    for position, result in enumerate(results):
        divergences, rewards = zip(*result.points, strict=True)
        style = line_style(position)
        axes.plot(divergences, rewards, markersize=5, linewidth=1.8, label=result.name, **style)
        axes.plot(divergences[-1], rewards[-1], marker="*", markersize=15, color=style["color"])
    axes.set_xlabel("KL(policy || reference), nats per response")
    axes.set_ylabel("sentiment reward")
    axes.set_title("Reward against divergence through training (star: the end)", loc="left", fontsize=11)
    axes.legend(frameon=False)
    save_figure(figure, path)


def draw_pair(folder: Path, path: Path) -> None:
    """One test pair, each token coloured by its weight, with the known truth below it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..core.token_colors import WeightedText, save_png, token_pieces
    from ..sparse_po.evaluation import mask_weights

    reference = AutoModelForCausalLM.from_pretrained(resolve("playground")).eval()
    tokenizer = AutoTokenizer.from_pretrained(resolve("playground"))
    row = preference_dataset(1, split="test")[0]
    texts = []
    for side in ("chosen", "rejected"):
        inputs = response_inputs(tokenizer, row["prompt"], row[side])
        completion = inputs["completion_mask"][0].bool()
        mask = mask_weights(run_masks(folder), reference, inputs)[0][0]
        learned = torch.cat([torch.tensor([torch.nan]), mask.masked_fill(~completion[1:], torch.nan)])
        truth = torch.full_like(learned, torch.nan)
        truth[completion] = torch.tensor(token_truth(row[side])).abs() / 2 * float(mask.max())
        pieces = token_pieces(tokenizer, inputs["input_ids"][0].tolist())
        texts.append(WeightedText(f"{side}: learned weights", pieces, learned.tolist()))
        texts.append(WeightedText(f"{side}: known strength of sentiment, scaled", pieces, truth.tolist()))
    save_png(texts, "SparsePO common mask on a test pair", path)
