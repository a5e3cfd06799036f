"""
Run a pipeline: stage after stage, each a recipe of a command, the output of one an input of the next.

trl-ext pipeline --config pipeline/playground
trl-ext pipeline --config pipeline/playground --stages.sft.settings.max_steps 10 --until sft

What is done is not done again, and an interrupted stage goes on from its last checkpoint. At the end, and where a
stage fails, `report.html` in the output folder has it all.
"""

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import yaml
from rich.console import Console

from ..core.quiet import VERBOSE_VARIABLE
from ..core.safe_text import for_terminal
from ..core.status import REQUEUE_STATUS
from ..launcher import run_launcher
from ..scripts.recipe.strict_parser import take_flag
from .definition import Pipeline, Stage, read_pipeline
from .progress import Progress


_WIDTH = 80
_WORDS = {
    "done": "done",
    "new": "to run",
    "interrupted": "to go on with",
    "outdated": "outdated",
    "unknown": "of unknown origin",
}


def main(arguments: list[str], training: Mapping[str, str], run: Callable[[list[str]], int]) -> int:
    """
    Runs `trl-ext pipeline`.

    Args:
        arguments (`list[str]`):
            Arguments.
        training (`Mapping[str, str]`):
            Script module of each training command.
        run (`Callable`):
            `trl-ext` itself: takes the words of a training command's line and returns its exit status.

    Returns:
        `int`: exit status; of a failed stage its own.

    Raises:
        RecipeError: If the pipeline or a recipe of it is refused.
        RunError: If a stage is outdated, or another process runs the pipeline.
    """
    from .usage import usage_text

    console = Console(highlight=False, soft_wrap=True)
    arguments = list(arguments)
    if "--help" in arguments or "-h" in arguments:
        console.print(usage_text(training), markup=False)
        return 0
    dry = take_flag(arguments, "--dry_run") | take_flag(arguments, "--dry-run")
    pipeline = read_pipeline(arguments, training)
    progress = Progress(pipeline)
    if dry:
        console.print(plan_text(pipeline, progress), markup=False)
        return 0
    from ..core.run_folder import RunLock  # which imports torch

    lock = RunLock(pipeline.output_dir)
    lock.acquire()
    try:
        with _environment(pipeline):
            return _run(pipeline, progress, run, console)
    finally:
        lock.release()


def plan_text(pipeline: Pipeline, progress: Progress) -> str:
    """What a pipeline would do now, an entry for each stage, for 80 columns."""
    width = max((len(stage.name) for stage in pipeline.stages), default=0)
    lines = textwrap.wrap(for_terminal(pipeline.title), _WIDTH)
    waits: set[str] = set()
    for stage in pipeline.stages:
        state = "new" if waits & set(stage.reads()) else progress.state(stage)
        if state != "done":
            waits.add(stage.name)
        reads = f"reads {', '.join(stage.reads())}" if stage.reads() else ""
        words = "; ".join(filter(None, (stage.command, stage.config, reads)))
        lines.append(f"{for_terminal(stage.name):<{width}}  {_WORDS[state]}")
        lines += textwrap.wrap(
            for_terminal(words), _WIDTH, initial_indent=" " * (width + 2), subsequent_indent=" " * (width + 2),
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)


@contextmanager
def _environment(pipeline: Pipeline) -> Iterator[None]:
    """The pipeline's variables, for the processes of its stages."""
    variables = {**pipeline.environment, **({VERBOSE_VARIABLE: "1"} if pipeline.verbose else {})}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _run(pipeline: Pipeline, progress: Progress, run: Callable[[list[str]], int], console: Console) -> int:
    from .report import write_report

    status = 0
    ran: set[str] = set()
    for number, stage in enumerate(pipeline.stages, start=1):
        title = f"Stage {number} of {len(pipeline.stages)}: {stage.name} ({stage.command})"
        if progress.state(stage) == "done":
            console.print(f"{title} is done: {pipeline.folder(stage)}", markup=False)
            continue
        console.rule(for_terminal(title))
        status = run_stage(pipeline, progress, stage, run)
        if status:
            break
        ran.add(stage.name)
    if status:
        console.print(
            f"The stage `{stage.name}` ended with status {status}. What came before it is kept: the same command goes "
            "on from here.",
            markup=False,
        )
    if status != REQUEUE_STATUS and status < 128:  # else a signal has ended it, and nobody waits
        console.print(f"Report: {write_report(pipeline, progress, ran)}", markup=False)
    return status


def run_stage(pipeline: Pipeline, progress: Progress, stage: Stage, run: Callable[[list[str]], int]) -> int:
    """
    Runs one stage, whose inputs are there.

    Args:
        pipeline ([`Pipeline`]):
            Pipeline.
        progress ([`Progress`]):
            Its markers.
        stage ([`Stage`]):
            Stage, which is not done.
        run (`Callable`):
            `trl-ext` itself.

    Returns:
        `int`: exit status.

    Raises:
        RunError: If the stage is outdated and may not be done again.
    """
    from ..core.checkpoint import checkpoints

    command = pipeline.commands[stage.command]
    marker = progress.begin(stage, pipeline.overwrite)
    words = [stage.command]
    if command.takes_recipe:
        path = progress.recipe_path(stage)
        source = f"{stage.config} and the settings" if stage.config else "the settings"
        head = f"# The stage {stage.name} as it is run, made from {source} of the stage in {pipeline.path}\n"
        path.write_text(head + yaml.safe_dump(pipeline.recipe(stage), sort_keys=False, allow_unicode=True))
        words += ["--config", str(path)]
    if command.options:
        words += pipeline.options(stage)
    for name in ("accelerate_config", "num_processes"):
        if getattr(stage, name) is not None:
            words += [f"--{name}", str(getattr(stage, name))]
    marker.command = ["trl-ext", *words]
    progress.write(stage, marker)
    # What code the pipeline and its recipes name has been agreed to, or lies in the working folder
    if command.takes_recipe:
        words.append("--trust_recipe_code")
    if command.trains and checkpoints(pipeline.folder(stage)):
        words += ["--resume_from_checkpoint", "true"]
    start = time.monotonic()
    try:
        if command.trains:
            status = run(words)
        else:
            status = run_launcher([sys.executable, "-m", "trl_ext.cli", *words], dict(os.environ), None)
    finally:
        marker.seconds += time.monotonic() - start
        progress.write(stage, marker)
    if status == 0:
        marker.done = True
        progress.write(stage, marker)
    return status
