"""The demo on the playground, where what matters in a response is known: SparsePO against its relatives,
GRPO with and without constraints, a reward model that learns by equilibrium propagation, and a pipeline of all."""

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console


if TYPE_CHECKING:
    from .work import Part

PARTS = ("sparse_po", "constrained_ppo", "equilibrium", "pipeline")
# Those of them that train the large base model; the other parts begin with the small one
_WITH_LARGE_MODEL = ("sparse_po",)


def main(arguments: list[str] | None = None) -> int:
    """
    Runs `trl-ext demo`.

    Args:
        arguments (`list[str]`, *optional*):
            Arguments. Defaults to the process's own.

    Returns:
        `int`: exit status.

    Raises:
        FileNotFoundError: If the recipe is missing.
    """
    from ..core.quiet import VERBOSE_VARIABLE, quiet_run
    from ..scripts.recipe.packaged import find_packaged
    from .work import default_workers, run_parts

    parser = argparse.ArgumentParser("trl-ext demo", description=__doc__)
    parser.add_argument("--config", default="sparse_po/playground", help="recipe of the part sparse_po")
    parser.add_argument("--output_dir", default="outputs/demo", help="folder for models and pictures")
    parser.add_argument("--max_steps", type=int, default=None, help="steps of each method, to try the demo quickly")
    listed = f"parts to run, of {', '.join(PARTS)}; all by default"
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=listed)
    parser.add_argument("--workers", type=int, default=default_workers(), help="trainings at a time")
    parser.add_argument("--verbose", action="store_true", help="log all that is logged, and what libraries warn of")
    options = parser.parse_args(arguments)
    if not Path(options.config).is_file() and find_packaged(options.config) is None:
        raise FileNotFoundError(f"`--config {options.config}` is not a file. Give the playground recipe.")
    if options.workers < 1:
        raise ValueError(f"`--workers {options.workers}` must be at least 1.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.verbose:
        os.environ[VERBOSE_VARIABLE] = "1"  # for the processes that the demo starts too
    console, start = Console(), time.monotonic()
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with quiet_run():
        parts = _parts(options, output_dir, console)
        count = sum(len(part.tasks) for part in parts)
        console.print(
            f"{count} pieces of work, {options.workers} at a time, each with a log in {output_dir}. Base models are "
            "trained first where there are none yet.", highlight=False, soft_wrap=True,
        )  # fmt: skip
        run_parts(parts, options.workers, lambda line: console.print(line, highlight=False, soft_wrap=True))
    console.print(f"{time.monotonic() - start:.0f} seconds in all.", highlight=False)
    return 0


def _parts(options: argparse.Namespace, output_dir: Path, console: Console) -> "list[Part]":
    """The parts that are asked for, after their base models; long pieces begin, so that no core waits for them."""
    from .base_models import base_models_part
    from .constrained_ppo import constrained_ppo_part
    from .equilibrium import equilibrium_part
    from .pipeline import pipeline_part
    from .sparse_po import sparse_po_part

    made = {
        "pipeline": pipeline_part(output_dir / "pipeline", console, options.max_steps),
        "constrained_ppo": constrained_ppo_part(output_dir / "constrained_ppo", console, options.max_steps),
        "sparse_po": sparse_po_part(output_dir, options.config, console, options.max_steps),
        "equilibrium": equilibrium_part(output_dir / "equilibrium", console, options.max_steps),
    }
    # The large model takes longest, and what waits for the small one waits beside it
    models = ["playground"] if set(options.parts) & set(_WITH_LARGE_MODEL) else []
    models += ["playground-small"] if set(options.parts) - set(_WITH_LARGE_MODEL) else []
    return [base_models_part(output_dir, models), *(part for name, part in made.items() if name in options.parts)]
