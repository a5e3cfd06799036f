"""The demo on the playground, where what matters in a response is known: SparsePO against its relatives,
GRPO with and without constraints, and a reward model that learns by equilibrium propagation."""

import argparse
import importlib
import os
from pathlib import Path

from rich.console import Console


# In the order in which they run; each is a module with a function `demonstrate_<part>`
PARTS = ("sparse_po", "constrained_ppo", "equilibrium")


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

    parser = argparse.ArgumentParser("trl-ext demo", description=__doc__)
    parser.add_argument("--config", default="sparse_po/playground", help="recipe of the part sparse_po")
    parser.add_argument("--output_dir", default="outputs/demo", help="folder for models and pictures")
    parser.add_argument("--max_steps", type=int, default=None, help="steps of each method, to try the demo quickly")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; all by default")
    parser.add_argument("--verbose", action="store_true", help="print all that is logged, and what libraries warn of")
    options = parser.parse_args(arguments)
    if not Path(options.config).is_file() and find_packaged(options.config) is None:
        raise FileNotFoundError(f"`--config {options.config}` is not a file. Give the playground recipe.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.verbose:
        os.environ[VERBOSE_VARIABLE] = "1"  # for the commands that the demo runs too
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with quiet_run():
        _demonstrate(options, output_dir, Console())
    return 0


def _demonstrate(options: argparse.Namespace, output_dir: Path, console: Console) -> None:
    from ..playground import resolve

    console.rule("Base model of the playground")
    resolve("playground")
    for part in options.parts:
        demonstrate = getattr(importlib.import_module(f".{part}", __name__), f"demonstrate_{part}")
        if part == "sparse_po":
            demonstrate(output_dir, options.config, console, options.max_steps)
        else:
            demonstrate(output_dir / part, console, options.max_steps)
