"""The `--help` of `trl-ext pipeline`."""

import dataclasses
import textwrap
from collections.abc import Mapping

from .definition import PipelineArguments, commands_of


_OPTIONS = {
    "--config NAME": "The pipeline: a YAML file, or the name of a packaged one, such as pipeline/playground.",
    "--dry_run": "Say which stages are done and which would run, and run none.",
    "--verbose": "Print all that the stages log.",
    "--trust_recipe_code": "Run a pipeline or recipe outside the working folder that names code to import.",
    "--stages.NAME.settings.KEY VALUE": "One setting of a stage.",
}


def usage_text(training: Mapping[str, str]) -> str:
    """
    The help, for 80 columns.

    Args:
        training (`Mapping[str, str]`):
            Script module of each training command.

    Returns:
        `str`
    """
    commands = commands_of(training)
    lines = ["usage: trl-ext pipeline --config PIPELINE [options]", ""]
    for option, text in _OPTIONS.items():
        lines += _entry(option, text)
    lines += ["", "Keys of the file, and options"]
    for item in dataclasses.fields(PipelineArguments):
        default = "" if item.default in (dataclasses.MISSING, None) else f" (default: {item.default})"
        lines += _entry(f"--{item.name}", f"{item.metadata['help']}{default}")
    keys = "A stage has `command`, `config`, `settings`, `options`, `accelerate_config` and `num_processes`."
    for text in (keys, f"Commands of stages: {', '.join(commands)}."):
        lines += ["", *textwrap.wrap(text, 80, break_on_hyphens=False)]
    return "\n".join(lines)


def _entry(option: str, text: str) -> list[str]:
    return [f"  {option}", *textwrap.wrap(text, 80, initial_indent="      ", subsequent_indent="      ")]
