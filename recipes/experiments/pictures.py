"""
The pictures of docs/results drawn again from the runs that are kept beside them, without training.

```bash
python -m recipes.experiments.pictures --output_dir docs/results
```
"""

import argparse
import gzip
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_ext.core.token_colors import WeightedText, save_png
from trl_ext.demo.sparse_po import MethodResult, draw_frontier
from trl_ext.equilibrium.report import draw_alignment

from .adamp_language_models import run as adamp_language_models
from .adamp_scale_invariance import run as adamp_scale_invariance
from .constrained_ppo_playground import long_run, long_run_report
from .constrained_ppo_smollm2 import report as constrained_ppo_smollm2
from .equilibrium_critic import run as equilibrium_critic
from .equilibrium_depth import run as equilibrium_depth
from .equilibrium_minilm import report as equilibrium_minilm
from .method_comparison import alone, proxy_points
from .method_comparison_report import draw_methods, draw_overoptimization
from .sparse_po_sentiment.report import Frontier, draw_frontiers
from .sparse_po_smollm2 import report as sparse_po_smollm2


RESULTS = Path("docs/results")
PLAYGROUND_PROXIES = ["positive_word_share", "reference_similarity"]
Rows = list[dict[str, Any]]


def long_comparison(rows: Rows, path: Path) -> None:
    """Gold against updates of the long comparison, with the trials that were chosen for its length."""
    tuned_on, horizon = 100, 128
    names = {row["name"] for row in rows}
    chosen = {(name, horizon): long_run.chosen_trial(rows, name, tuned_on, horizon) for name in names}
    long_run_report.draw([row for row in rows if row["seed"] != tuned_on], chosen, horizon, path)


def chats(rows: Rows, path: Path) -> None:
    """GRPO and constrained GRPO on SmolLM2, without the runs that are in no table."""
    arms = ("GRPO", "constrained GRPO (xi)")
    constrained_ppo_smollm2.draw([row for row in rows if row["arm"] in arms], path)


def critics(rows: Rows, path: Path) -> None:
    """The critics' learning curves at a rate of 0.005, of a run that was made twice the later one."""
    kept = {(row["critic"], row["seed"]): row for row in rows if row["rate"] == 0.005}
    names = list(dict.fromkeys(critic for critic, _ in kept))
    equilibrium_critic.draw(list(kept.values()), names, rows[0]["seed"], path)


def dialog(rows: Rows, path: Path) -> None:
    """Every method on DailyDialog."""
    draw_methods(rows, path, "evaluation score")


def playground_methods(rows: Rows, path: Path) -> None:
    """Every method on the playground."""
    draw_methods(rows, path, "playground_gold")


def playground_overoptimization(rows: Rows, path: Path) -> None:
    """The playground's rewards, each maximised alone."""
    draw_overoptimization(rows, {name: alone(name) for name in PLAYGROUND_PROXIES}, path, "playground_gold")


def playground_proxy_points(rows: Rows, path: Path) -> None:
    """The joint surface of the playground's proxy points."""
    with tempfile.TemporaryDirectory() as folder:
        proxy_points(rows, PLAYGROUND_PROXIES, Path(folder), degree=3)
        shutil.copy(Path(folder) / "joint_surface.png", path)


def scale_invariance(rows: Rows, path: Path) -> None:
    """Norms and effective steps of both problems."""
    toys = {row["name"]: row["toy"] for row in rows if "toy" in row}
    adamp_scale_invariance.plot(toys, [row for row in rows if "toy" not in row], path)


def language_models(rows: Rows, path: Path) -> None:
    """Loss against learning rate, and effective steps."""
    adamp_language_models.plot([adamp_language_models.Run(**row["run"]) for row in rows], rows, path)


def homeostasis(rows: Rows, path: Path) -> None:
    """Accuracy, symmetry and cosines through training."""
    from tests.benchmarks import equilibrium_homeostasis

    equilibrium_homeostasis.plot({row["arm"]: row["runs"] for row in rows}, str(path))


def masks(heading: str) -> Callable[[Rows, Path], None]:
    """Texts coloured by their weights."""

    def draw(rows: Rows, path: Path) -> None:
        texts = [
            WeightedText(row["title"], row["pieces"], [math.nan if w is None else w for w in row["weights"]])
            for row in rows
        ]
        save_png(texts, heading, path)

    return draw


def alignment(rows: Rows, path: Path) -> None:
    """Cosines and angle through training."""
    draw_alignment({row["name"]: row["history"] for row in rows}, path)


def demo_frontier(rows: Rows, path: Path) -> None:
    """Reward against KL of the demo."""
    draw_frontier([MethodResult(**row) for row in rows], path)


def smollm2_frontier(rows: Rows, path: Path) -> None:
    """Reward against KL on SmolLM2."""
    sparse_po_smollm2.draw_frontier(rows, "sentiment", path)


# Picture, the runs it is drawn from, and how; both lie in docs/results
PICTURES: dict[str, tuple[str, Callable[[Rows, Path], None]]] = {
    "adamp_language_models": ("adamp_language_models_runs", language_models),
    "adamp_scale_invariance": ("adamp_scale_invariance_runs", scale_invariance),
    "constrained_ppo_dailydialog_methods": ("constrained_ppo_dailydialog_runs", dialog),
    "constrained_ppo_playground_long": ("constrained_ppo_playground_long_runs", long_comparison),
    "constrained_ppo_playground_methods": ("constrained_ppo_playground_runs", playground_methods),
    "constrained_ppo_playground_overoptimization": ("constrained_ppo_playground_runs", playground_overoptimization),
    "constrained_ppo_playground_proxy_points": ("constrained_ppo_playground_runs", playground_proxy_points),
    "constrained_ppo_playground_warmup": ("constrained_ppo_playground_warmup_runs", long_comparison),
    "constrained_ppo_smollm2": ("constrained_ppo_smollm2_runs", chats),
    "equilibrium_critic": ("equilibrium_critic_runs", critics),
    "equilibrium_depth": ("equilibrium_depth_runs", equilibrium_depth.plot),
    "equilibrium_homeostasis": ("equilibrium_homeostasis_runs", homeostasis),
    "equilibrium_minilm": ("equilibrium_minilm_runs", equilibrium_minilm.plot),
    "equilibrium_playground_alignment": ("equilibrium_playground_alignment_runs", alignment),
    "sparse_po_playground_frontier": ("sparse_po_playground_demo_runs", demo_frontier),
    "sparse_po_playground_masks": ("sparse_po_playground_masks", masks("SparsePO common mask on a test pair")),
    "sparse_po_smollm2": ("sparse_po_smollm2_runs", smollm2_frontier),
    "sparse_po_smollm2_masks": ("sparse_po_smollm2_masks", masks("SparsePO token masks at step 16")),
}


def read_rows(name: str) -> Rows:
    """Rows of a file of runs in docs/results."""
    with gzip.open(RESULTS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sentiment_frontiers(page: str) -> dict[str, Frontier]:
    """The frontiers of the table in docs/results/sparse_po_sentiment.md: its runs were not kept."""
    found: dict[str, Frontier] = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and "±" in cells[2]:
            (reward, reward_spread), (divergence, spread) = (map(float, cell.split(" ± ")) for cell in cells[2:4])
            found.setdefault(cells[0], []).append((divergence, reward, spread, reward_spread, float(cells[1])))
    return found


def draw(name: str, output_dir: Path) -> None:
    """Draws one picture of docs/results."""
    path = output_dir / f"{name}.png"
    if name == "sparse_po_sentiment":
        draw_frontiers(sentiment_frontiers((RESULTS / "sparse_po_sentiment.md").read_text(encoding="utf-8")), path)
    else:
        rows, drawn_by = PICTURES[name]
        drawn_by(read_rows(rows), path)


NAMES = (*PICTURES, "sparse_po_sentiment")


def main() -> None:
    """Draws the pictures that are asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="Where to.")
    parser.add_argument("--names", nargs="+", default=NAMES, choices=NAMES, metavar="NAME", help="Which; default all.")
    arguments = parser.parse_args()
    for name in arguments.names:
        draw(name, arguments.output_dir)


if __name__ == "__main__":
    main()
