"""
AdamW, AdamP and the radial family (AdamO, AdamH) in language modelling at equal cost of tuning, on the three small
models of `adamp_language_models`: a Llama (no scale-invariant weight), a Qwen3 (queries and keys) and a Gemma 3 (every
block).

Each method gets a grid of the same number of settings: three learning rates, and two values of the number that
matters most besides it, weight decay, or for AdamH the learning rate of embeddings and norms. The setting is chosen on
the tuning seeds by the loss on one half of the held-out text; then models of other seeds are trained with it, and the
loss reported on the other half. Finished runs are kept in `runs.jsonl`, so an interrupted experiment goes on where it
stopped.

python -m recipes.experiments.adamp_radial_family.run \
    --config recipes/experiments/adamp_radial_family/config.yaml \
    --imdb_dir DATA/imdb --tokenizer_name_or_path DATA/stories260k
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, get_scheduler

from trl_ext.core.parameter_groups import decay_groups
from trl_ext.optim import AdamH, AdamO, AdamP, hidden_matrices
from trl_ext.scripts.recipe.strict_parser import StrictParser, run_strictly

from ..adamp_language_models.run import (
    FAMILIES,
    TITLES,
    LanguageModelArguments,
    build_model,
    held_out_loss,
    token_blocks,
)
from ..runner import FinishedRuns, markdown_table


console = Console(highlight=False)
BETAS = (0.9, 0.95)


class Method(NamedTuple):
    """An optimizer, its learning rates, and the name and values of the second number that is tuned."""

    make: Callable[..., torch.optim.Optimizer]
    learning_rates: tuple[float, ...]
    second: str
    values: tuple[float, ...]


def _adamw(model: PreTrainedModel, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=lr, betas=BETAS)


def _adamp(wd_ratio: float) -> Callable[..., torch.optim.Optimizer]:
    def make(model: PreTrainedModel, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return AdamP(decay_groups(model, weight_decay), lr=lr, betas=BETAS, wd_ratio=wd_ratio)

    return make


def _adamo(model: PreTrainedModel, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    groups = decay_groups(model, weight_decay, named=True)
    return AdamO(groups, lr=lr, betas=BETAS, projection=hidden_matrices(model))


def _adamh(model: PreTrainedModel, lr: float, adam_ratio: float) -> torch.optim.Optimizer:
    groups = decay_groups(model, 0.1, named=True)
    return AdamH(groups, lr=lr, betas=BETAS, adam_ratio=adam_ratio, projection=hidden_matrices(model))


_RATES, _DECAYS = (0.003, 0.01, 0.03), (0.1, 1.0)
METHODS = {
    "AdamW": Method(_adamw, _RATES, "weight_decay", _DECAYS),
    "AdamP, wd_ratio 0.1": Method(_adamp(0.1), _RATES, "weight_decay", _DECAYS),
    "AdamP, wd_ratio 1": Method(_adamp(1.0), _RATES, "weight_decay", _DECAYS),
    "AdamO": Method(_adamo, _RATES, "weight_decay", _DECAYS),
    "AdamH": Method(_adamh, (0.01, 0.03, 0.1), "adam_ratio", (0.1, 0.3)),
}


@dataclass
class RadialFamilyArguments:
    """
    Arguments of the experiment.

    Args:
        imdb_dir (`str`):
            Folder with `imdb_unsup.parquet` (column `text`).
        tokenizer_name_or_path (`str`):
            Tokenizer.
        families (`list[str]`):
            Model types of transformers.
        methods (`list[str]`):
            `"AdamW"`, `"AdamP, wd_ratio 0.1"`, `"AdamP, wd_ratio 1"`, `"AdamO"`, `"AdamH"`.
        tuning_seeds, test_seeds (`list[int]`):
            Seeds that settings are chosen on, and seeds that they are reported on.
        max_steps, batch_size, block_size (`int`):
            Steps; sequences of a step; tokens of a sequence.
        hidden_size, num_layers (`int`):
            Size of the models.
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
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Optimizers."})
    tuning_seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds for tuning."})
    test_seeds: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4, 5], metadata={"help": "Seeds that the chosen setting is reported on."}
    )
    max_steps: int = field(default=150, metadata={"help": "Steps of a run."})
    batch_size: int = field(default=8, metadata={"help": "Sequences of a step."})
    block_size: int = field(default=32, metadata={"help": "Tokens of a sequence."})
    hidden_size: int = field(default=32, metadata={"help": "Width of the models."})
    num_layers: int = field(default=2, metadata={"help": "Layers of the models."})
    warmup_steps: int = field(default=10, metadata={"help": "Steps of linear warm-up."})
    num_texts: int = field(default=1000, metadata={"help": "Reviews that are tokenized."})
    output_dir: str = field(default="outputs/adamp_radial_family", metadata={"help": "Folder of the results."})

    def __post_init__(self):
        for name, known in (("families", FAMILIES), ("methods", METHODS)):
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown:
                raise ValueError(f"`{name}` has {unknown}; the experiment knows {sorted(known)}.")
        both = sorted(set(self.tuning_seeds) & set(self.test_seeds))
        if both:
            raise ValueError(f"`test_seeds` has {both}, which settings are chosen on; give others.")


@dataclass(frozen=True)
class Run:
    """One training run and its result; losses in nats a token. `value` is that of the method's second number."""

    family: str
    method: str
    learning_rate: float
    value: float
    seed: int
    tuning_loss: float
    test_loss: float
    seconds: float

    @property
    def setting(self) -> tuple[float, float]:
        """What was tuned."""
        return self.learning_rate, self.value


def train(
    args: RadialFamilyArguments, data: torch.Tensor, family: str, method: str, setting: tuple[float, float], seed: int
) -> Run:
    """Trains one model from random weights and measures its loss on both halves of the held-out text."""
    start = time.perf_counter()
    held_out, training = data[:256], data[256:]
    sizes = LanguageModelArguments(
        "", "", hidden_size=args.hidden_size, num_layers=args.num_layers, block_size=args.block_size
    )
    model = build_model(sizes, family, int(data.max()) + 1, seed)
    optimizer = METHODS[method].make(model, *setting)
    scheduler = get_scheduler("cosine_with_min_lr", optimizer, args.warmup_steps, args.max_steps, {"min_lr_rate": 0.1})
    order = torch.Generator().manual_seed(seed)
    for _ in range(args.max_steps):
        batch = training[torch.randint(len(training), (args.batch_size,), generator=order)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    tuning_loss, test_loss = (held_out_loss(model, half) for half in (held_out[:128], held_out[128:]))
    return Run(family, method, *setting, seed, tuning_loss, test_loss, time.perf_counter() - start)


def best_setting(runs: list[Run]) -> tuple[float, float]:
    """The setting of the lowest tuning loss, averaged over its seeds; one that diverged counts as infinitely bad."""
    settings = sorted({run.setting for run in runs})
    means = [np.mean([run.tuning_loss for run in runs if run.setting == setting]) for setting in settings]
    return settings[int(np.argmin(np.nan_to_num(means, nan=np.inf)))]


def table(tuning: list[Run], tested: list[Run]) -> str:
    """The test loss of each method at its chosen setting, and its difference to AdamW's by seed, as Markdown."""
    rows = []
    for family, name in dict.fromkeys((run.family, run.method) for run in tested):
        own = {run.seed: run.test_loss for run in tested if (run.family, run.method) == (family, name)}
        base = {run.seed: run.test_loss for run in tested if (run.family, run.method) == (family, "AdamW")}
        rate, value = best_setting([run for run in tuning if (run.family, run.method) == (family, name)])
        pairs = [own[seed] - base[seed] for seed in sorted(own) if seed in base and name != "AdamW"]
        spread = f" ± {np.std(list(own.values()), ddof=1):.3f}" if len(own) > 1 else ""
        rows.append(
            [
                TITLES[family], name, f"{rate:g}", f"{METHODS[name].second} {value:g}",
                f"{np.mean(list(own.values())):.3f}{spread}", f"{np.mean(pairs):+.3f}" if pairs else "",
                ", ".join(f"{pair:+.3f}" for pair in pairs),
            ]
        )  # fmt: skip
    columns = ["model", "method", "rate", "second", "test loss", "minus AdamW's, mean", "by seed"]
    return markdown_table(columns, rows)


def grid(tuning: list[Run]) -> str:
    """The tuning loss of every setting, as Markdown: one column for each learning rate, lowest to highest."""
    rows = []
    for family, name in dict.fromkeys((run.family, run.method) for run in tuning):
        method = METHODS[name]
        for value in method.values:
            cells = []
            for rate in method.learning_rates:
                losses = [
                    run.tuning_loss
                    for run in tuning
                    if (run.family, run.method, *run.setting) == (family, name, rate, value)
                ]
                cells.append(f"{np.mean(losses):.3f} at {rate:g}" if losses else "")
            rows.append([TITLES[family], name, f"{method.second} {value:g}", *cells])
    return markdown_table(["model", "method", "second", "low rate", "middle", "high"], rows)


def main(args: RadialFamilyArguments) -> None:
    """Runs what is missing of the experiment and writes `results.md`."""
    folder = Path(args.output_dir)
    finished = FinishedRuns(folder)
    texts = LanguageModelArguments(
        args.imdb_dir, args.tokenizer_name_or_path, block_size=args.block_size, num_texts=args.num_texts
    )
    data = token_blocks(texts, AutoTokenizer.from_pretrained(args.tokenizer_name_or_path))
    console.print(f"{data.numel()} tokens")

    def run(family: str, name: str, setting: tuple[float, float], seed: int) -> None:
        key = {"family": family, "method": name, "setting": list(setting), "seed": seed}
        if any(key.items() <= row.items() for row in finished.rows):
            return
        found = train(args, data, family, name, setting, seed)
        finished.add({"run": asdict(found), **key})
        console.print(found)

    def runs(seeds: list[int]) -> list[Run]:
        return [found for row in finished.rows if (found := Run(**row["run"])).seed in seeds]

    for seed, family, name in itertools.product(args.tuning_seeds, args.families, args.methods):
        method = METHODS[name]
        for setting in itertools.product(method.learning_rates, method.values):
            run(family, name, setting, seed)
    tuning = runs(args.tuning_seeds)
    for seed, family, name in itertools.product(args.test_seeds, args.families, args.methods):
        run(family, name, best_setting([r for r in tuning if (r.family, r.method) == (family, name)]), seed)
        tested = runs(args.test_seeds)
        (folder / "results.md").write_text(f"{table(tuning, tested)}\n\n{grid(tuning)}\n")


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((RadialFamilyArguments,))


if __name__ == "__main__":
    run_strictly(make_parser, main)
