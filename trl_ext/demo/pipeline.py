"""The demo's part that runs a whole pipeline, as a user would: each stage a process of `trl-ext`."""

import json
import subprocess
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .work import Part, Task


RECIPE = "pipeline/playground"


def pipeline_part(output_dir: Path, console: Console, max_steps: int | None = None) -> Part:
    """
    Runs the playground's pipeline and prints its stages.

    Args:
        output_dir (`Path`):
            Folder of the pipeline; its report is `report.html`.
        console ([`~rich.console.Console`]):
            Console to print on.
        max_steps (`int`, *optional*):
            Steps of its first two stages, after which it ends, to try it quickly.

    Returns:
        [`Part`]
    """
    words = ["--config", RECIPE, "--output_dir", str(output_dir), "--overwrite"]
    if max_steps is not None:
        words += ["--until", "reward"]
        words += [f"--stages.{name}.settings.max_steps={max_steps}" for name in ("sft", "reward")]
    log = output_dir.with_name(f"{output_dir.name}.log")

    def show(results: list[dict[str, float]]) -> None:
        console.print(stages_table(results[0]))
        console.print(f"Report: {output_dir / 'report.html'}.", soft_wrap=True)

    return Part("Pipeline", [Task("all stages", log, run_pipeline, (output_dir, words))], show)


def run_pipeline(output_dir: Path, words: list[str]) -> dict[str, float]:
    """Runs `trl-ext pipeline`; seconds of each stage."""
    subprocess.run([sys.executable, "-m", "trl_ext.cli", "pipeline", *words], check=True)
    markers = sorted((output_dir / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return {path.stem: json.loads(path.read_text())["seconds"] for path in markers}


def stages_table(seconds: dict[str, float]) -> Table:
    """The stages and their time as a table."""
    table = Table(title="A pipeline: each stage reads what the ones before have made", box=SIMPLE_HEAD)
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.0f}")
    return table
