"""
AdamW against AdamP in language modelling at equal tuning budget, on small models with and without scale-invariant
weights: Llama (none), Qwen3 (norms on queries and keys) and Gemma 3 (norms around every block).

Every optimizer trains every model from scratch at every learning rate and seed; the learning rate is chosen on one
half of the held-out text and the loss reported on the other. Finished runs are kept in `runs.jsonl`, so an interrupted
experiment goes on where it stopped.

python -m recipes.experiments.adamp_language_models.run \
    --config recipes/experiments/adamp_language_models/config.yaml \
    --imdb_dir DATA/imdb --tokenizer_name_or_path DATA/stories260k
"""

import itertools
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)

from trl_ext.core.figures import line_style, new_axes, save_figure
from trl_ext.core.parameter_groups import decay_groups
from trl_ext.optim import AdamP
from trl_ext.optim.step_geometry import StepRecorder
from trl_ext.scripts.recipe.strict_parser import StrictParser, run_strictly

from ..runner import FinishedRuns, markdown_table


console = Console(highlight=False)

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"AdamW": torch.optim.AdamW, "AdamP": AdamP}
FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {}, "gemma3_text": {"sliding_window": 4096}}
TITLES = {"llama": "Llama-like", "qwen3": "Qwen3-like", "gemma3_text": "Gemma-3-like"}
STYLES = {name: line_style(position) for position, name in enumerate(("AdamW", "AdamP"))}


@dataclass
class LanguageModelArguments:
    """
    Arguments of the experiment.

    Args:
        imdb_dir (`str`):
            Folder with `imdb_unsup.parquet` (column `text`).
        tokenizer_name_or_path (`str`):
            Tokenizer.
        families (`list[str]`):
            Model types of transformers.
        optimizers (`list[str]`):
            `"AdamW"`, `"AdamP"`.
        learning_rates (`list[float]`):
            Learning rates, the same for every optimizer.
        seeds (`list[int]`):
            Seeds of initialisation and of the order of the data.
        max_steps, batch_size, block_size (`int`):
            Steps; sequences of a step; tokens of a sequence.
        hidden_size, num_layers (`int`):
            Size of the models.
        weight_decay (`float`):
            Weight decay, of all but biases and norms.
        warmup_steps (`int`):
            Steps of linear warm-up; then the rate falls as a cosine to a tenth.
        num_texts (`int`):
            Reviews that are tokenized.
        output_dir (`str`):
            Folder of the results.
    """

    imdb_dir: str = field(metadata={"help": "Folder with imdb_unsup.parquet."})
    tokenizer_name_or_path: str = field(metadata={"help": "Tokenizer."})
    families: list[str] = field(default_factory=lambda: list(FAMILIES), metadata={"help": "Model types."})
    optimizers: list[str] = field(default_factory=lambda: list(OPTIMIZERS), metadata={"help": "Optimizers."})
    learning_rates: list[float] = field(
        default_factory=lambda: [0.001, 0.003, 0.01, 0.03], metadata={"help": "Learning rates."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})
    max_steps: int = field(default=300, metadata={"help": "Steps of a run."})
    batch_size: int = field(default=8, metadata={"help": "Sequences of a step."})
    block_size: int = field(default=64, metadata={"help": "Tokens of a sequence."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the models."})
    num_layers: int = field(default=3, metadata={"help": "Layers of the models."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay."})
    warmup_steps: int = field(default=10, metadata={"help": "Steps of linear warm-up."})
    num_texts: int = field(default=3000, metadata={"help": "Reviews that are tokenized."})
    output_dir: str = field(default="outputs/optimizer_language_models", metadata={"help": "Folder of the results."})

    def __post_init__(self):
        for name, known in (("families", FAMILIES), ("optimizers", OPTIMIZERS)):
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown:
                raise ValueError(f"`{name}` has {unknown}; the experiment knows {sorted(known)}.")


@dataclass(frozen=True)
class Run:
    """One training run and its result; losses in nats a token, `share` the part of steps that the test passed."""

    family: str
    optimizer: str
    learning_rate: float
    seed: int
    tuning_loss: float
    test_loss: float
    norm_growth: float
    share: float
    seconds: float


def token_blocks(args: LanguageModelArguments, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Reviews as rows of `block_size` tokens, int64."""
    texts = pd.read_parquet(Path(args.imdb_dir) / "imdb_unsup.parquet")["text"][: args.num_texts]
    encoded = tokenizer([text.replace("<br />", " ") for text in texts], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([token for text in encoded for token in (*text, tokenizer.eos_token_id)])
    return ids[: len(ids) // args.block_size * args.block_size].view(-1, args.block_size)


def build_model(args: LanguageModelArguments, family: str, vocab_size: int, seed: int) -> PreTrainedModel:
    """A small model of a family, random weights."""
    heads = 4
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3 // 8 * 8,
        num_hidden_layers=args.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=args.hidden_size // heads,
        max_position_embeddings=args.block_size,
        tie_word_embeddings=True,
        **FAMILIES[family],
    )
    if family == "gemma3_text":
        config.query_pre_attn_scalar = args.hidden_size // heads
    config.initializer_range = args.hidden_size**-0.5  # the usual 0.02 is made for widths above a thousand
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def train(
    args: LanguageModelArguments, data: torch.Tensor, family: str, optimizer_name: str, learning_rate: float, seed: int
) -> tuple[Run, list[dict[str, Any]]]:
    """Trains one model; returns the run and the geometry of every tenth step, averaged over the weights."""
    start = time.perf_counter()
    held_out, training = data[:256], data[256:]
    model = build_model(args, family, int(data.max()) + 1, seed)
    groups = decay_groups(model, args.weight_decay)
    optimizer = OPTIMIZERS[optimizer_name](groups, lr=learning_rate, betas=(0.9, 0.95))  # type: ignore[call-arg]
    scheduler = get_scheduler("cosine_with_min_lr", optimizer, args.warmup_steps, args.max_steps, {"min_lr_rate": 0.1})
    watched = {name: p for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name}
    first_norms = {name: float(p.detach().norm()) for name, p in watched.items()}
    recorder, passes, trace = StepRecorder(watched), [], []
    order = torch.Generator().manual_seed(seed)
    for step in range(args.max_steps):
        batch = training[torch.randint(len(training), (args.batch_size,), generator=order)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        watch = step % 10 == 0
        if watch:
            recorder.before()
        optimizer.step()
        scheduler.step()
        if watch:
            geometry = recorder.after()
            passes.append(np.mean([step.level is not None for step in geometry.values()]))
            invariant = [g for name, g in geometry.items() if family != "llama" and _is_invariant(name, family)]
            chosen = invariant or list(geometry.values())
            trace.append(
                {
                    "step": step,
                    "angle": float(np.mean([g.angle for g in chosen])),
                    "norm": float(np.mean([g.norm for g in chosen])),
                    "loss": float(loss.detach()),
                }
            )
    growth = float(np.mean([float(p.detach().norm()) / first_norms[name] for name, p in watched.items()]))
    tuning_loss, test_loss = (held_out_loss(model, half) for half in (held_out[:128], held_out[128:]))
    seconds = time.perf_counter() - start
    return Run(
        family, optimizer_name, learning_rate, seed, tuning_loss, test_loss, growth, float(np.mean(passes)), seconds
    ), trace


def _is_invariant(name: str, family: str) -> bool:
    parts = ("q_proj", "k_proj") if family == "qwen3" else ("q_proj", "k_proj", "v_proj", "o_proj", "up_", "down_")
    return any(part in name for part in parts)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, blocks: torch.Tensor) -> float:
    """Loss of a model on rows of tokens, in nats a token."""
    return float(model(input_ids=blocks, labels=blocks).loss)


def best_learning_rate(runs: list[Run]) -> float:
    """The rate of the lowest tuning loss, averaged over the seeds; a run that diverged counts as infinitely bad."""
    rates = sorted({run.learning_rate for run in runs})
    means = [np.mean([run.tuning_loss for run in runs if run.learning_rate == rate]) for rate in rates]
    return rates[int(np.argmin(np.nan_to_num(means, nan=np.inf)))]


def table(runs: list[Run]) -> str:
    """The results at each optimizer's own best learning rate, as Markdown; differences are paired by seed."""
    columns = ["model", "optimizer", "best rate", "test loss", "AdamP - AdamW, by seed", "share of tests passed"]
    rows = []
    for family in dict.fromkeys(run.family for run in runs):
        best = {}
        for name in dict.fromkeys(run.optimizer for run in runs):
            own = [run for run in runs if (run.family, run.optimizer) == (family, name)]
            rate = best_learning_rate(own)
            best[name] = sorted((run for run in own if run.learning_rate == rate), key=lambda run: run.seed)
        for name, own in best.items():
            losses = [run.test_loss for run in own]
            pairs = zip(own, best.get("AdamW", own), strict=False)
            difference = ", ".join(f"{run.test_loss - other.test_loss:+.3f}" for run, other in pairs)
            spread = f" ± {np.std(losses, ddof=1):.3f}" if len(losses) > 1 else ""
            cells = [f"{own[0].learning_rate:g}", f"{np.mean(losses):.3f}{spread}", difference * (name != "AdamW")]
            cells += [f"{np.mean([getattr(run, key) for run in own]):.2f}" for key in ("share", "norm_growth")]
            rows.append([TITLES[family], name, *cells])
    return markdown_table([*columns, "norm growth"], rows)


def grid(runs: list[Run]) -> str:
    """Mean test loss of every learning rate, as Markdown."""
    rates = sorted({run.learning_rate for run in runs})
    rows = []
    for family, name in dict.fromkeys((run.family, run.optimizer) for run in runs):
        cells = []
        for rate in rates:
            losses = [r.test_loss for r in runs if (r.family, r.optimizer, r.learning_rate) == (family, name, rate)]
            cells.append(f"{np.mean(losses):.3f}" if losses else "")
        rows.append([TITLES[family], name, *cells])
    return markdown_table(["model", "optimizer", *(f"{rate:g}" for rate in rates)], rows)


def differences(runs: list[Run]) -> str:
    """Test loss of AdamP minus that of AdamW at every learning rate, seed by seed, as Markdown."""
    rates = sorted({run.learning_rate for run in runs})
    losses = {(run.family, run.optimizer, run.learning_rate, run.seed): run.test_loss for run in runs}
    rows = []
    for family in dict.fromkeys(run.family for run in runs):
        cells = []
        for rate in rates:
            seeds = [seed for f, name, r, seed in losses if (f, name, r) == (family, "AdamP", rate)]
            pairs = [
                losses[family, "AdamP", rate, seed] - losses[family, "AdamW", rate, seed]
                for seed in seeds
                if (family, "AdamW", rate, seed) in losses
            ]
            cells.append(", ".join(f"{pair:+.3f}" for pair in pairs))
        rows.append([TITLES[family], *cells])
    return markdown_table(["AdamP - AdamW, by seed", *(f"{rate:g}" for rate in rates)], rows)


def plot(runs: list[Run], traces: list[dict[str, Any]], path: Path) -> None:
    """Loss against learning rate, and effective step size in training at the rate that suits AdamW best."""
    families = list(dict.fromkeys(run.family for run in runs))
    figure, panels = new_axes(2, len(families), width=3.5, height=3.1)
    for by_rate, by_step, family in zip(panels, panels[len(families) :], families, strict=False):
        rate = best_learning_rate([r for r in runs if (r.family, r.optimizer) == (family, "AdamW")])
        for name, style in STYLES.items():
            own = [run for run in runs if (run.family, run.optimizer) == (family, name)]
            rates = sorted({run.learning_rate for run in own})
            losses = [[run.test_loss for run in own if run.learning_rate == r] for r in rates]
            by_rate.errorbar(
                rates, [np.mean(values) for values in losses], [np.std(values) for values in losses],
                **style, label=name, capsize=2,
            )  # fmt: skip
            kept = [
                t["trace"] for t in traces if (t["family"], t["optimizer"], t["learning_rate"]) == (family, name, rate)
            ]
            if kept:
                kept = [trace[1:] for trace in kept]  # The first step of a warm-up is none
                steps = [point["step"] for point in kept[0]]
                angles = np.mean([[point["angle"] for point in trace] for trace in kept], axis=0)
                by_step.plot(steps, angles, **style, markevery=5, markersize=4, label=name)
        by_rate.set(title=TITLES[family], xscale="log", xlabel="learning rate", ylabel="test loss (nats per token)")
        by_step.set(xlabel=f"step (learning rate {rate:g})", ylabel="effective step (radians)", yscale="log")
        by_rate.legend(frameon=False)
    save_figure(figure, path)


def main(args: LanguageModelArguments) -> None:
    """Runs what is missing of the experiment and writes `results.md` and `results.png`."""
    folder = Path(args.output_dir)
    finished = FinishedRuns(folder)
    data = token_blocks(args, AutoTokenizer.from_pretrained(args.tokenizer_name_or_path))
    console.print(f"{data.numel()} tokens")
    for seed, family, rate, name in itertools.product(args.seeds, args.families, args.learning_rates, args.optimizers):
        setting = {"family": family, "optimizer": name, "learning_rate": rate, "seed": seed}
        if finished.has(**setting):
            continue
        run, trace = train(args, data, family, name, rate, seed)
        finished.add({"run": asdict(run), **setting, "trace": trace})
        console.print(run)
    runs = [Run(**row["run"]) for row in finished.rows]
    (folder / "results.md").write_text("\n\n".join([table(runs), grid(runs), differences(runs)]) + "\n")
    plot(runs, finished.rows, folder / "results.png")


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((LanguageModelArguments,))


if __name__ == "__main__":
    run_strictly(make_parser, main)
