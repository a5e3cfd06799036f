"""The `--help` of a training command: what is of this package first, what TRL and transformers take after it."""

import dataclasses
import textwrap
from collections.abc import Iterable
from typing import Any


WIDTH = 80
_COMMAND_OPTIONS = (
    ("--config NAME", "Recipe: a YAML file, or the name of a packaged one (`trl-ext recipes`)."),
    ("--accelerate_config NAME", "File of an accelerate config, or the name of a packaged one: {configs}."),
    ("--num_processes N", "Processes, in place of the accelerate config's number."),
    ("--print_config", "Print every setting, given and default, as a recipe, and train nothing."),
    ("--dry_run", "Say what would be loaded, the effective batch and the steps, and train nothing."),
    ("--verbose", "Print all that is logged, every bar, and what other libraries warn of."),
    ("--trust_recipe_code", "Run a recipe outside the working folder that names code to import."),
    ("--FIELD.PLACE VALUE", "One value of a nested field, such as --constraints.0.threshold 0.5."),
)


def usage_text(parser: Any, command: str, configs: Iterable[str]) -> str:
    """
    The help of a training command, for 80 columns.

    Args:
        parser ([`StrictParser`]):
            The command's parser.
        command (`str`):
            Name of the command.
        configs (`Iterable[str]`):
            Names of the packaged accelerate configs.

    Returns:
        `str`
    """
    lines = [f"usage: trl-ext {command} --config RECIPE [options]", "", "Command"]
    for option, text in _COMMAND_OPTIONS:
        lines += _entry(option, text.format(configs=", ".join(configs)))
    actions = {action.dest: action for action in reversed(parser._actions)}
    for title, names in field_groups(parser).items():
        lines += ["", title]
        for name in names:
            lines += _entry(_option(actions[name]), _help(actions[name]))
    return "\n".join(lines)


def field_groups(parser: Any) -> dict[str, list[str]]:
    """Names of the parser's fields by where they come from, this package's first; a title for each group."""
    groups: dict[str, list[str]] = {}
    for dataclass in parser.dataclass_types:
        for field in dataclasses.fields(dataclass):
            if field.init:
                groups.setdefault(_title(dataclass, field.name), []).append(field.name)
    return dict(sorted(groups.items(), key=lambda item: _ORDER.index(item[0])))


_OURS, _MODEL, _TRL, _TRANSFORMERS = (
    "This package's own",
    "Model and data, as in TRL",
    "Method and run, as in TRL",
    "Training, as in transformers",
)
# What argparse converts a value with, in words
_KINDS = {"parse": "value", "string_to_bool": "true|false", "str": "text", "dict": "mapping"}
_ORDER = (_OURS, _MODEL, _TRL, _TRANSFORMERS)


def _title(dataclass: Any, name: str) -> str:
    """The group of a field: that of the class which states it last."""
    owner = next(cls for cls in dataclass.__mro__ if name in vars(cls).get("__annotations__", {}))
    package = owner.__module__.split(".")[0]
    if package == "trl" and not owner.__name__.endswith(("ModelConfig", "DatasetMixtureConfig", "ScriptArguments")):
        return _TRL
    return {"trl": _MODEL, "transformers": _TRANSFORMERS}.get(package, _OURS)


def _option(action: Any) -> str:
    if action.choices is not None:
        return f"{action.option_strings[0]} {{{','.join(str(getattr(c, 'value', c)) for c in action.choices)}}}"
    name = getattr(action.type, "__name__", "value")
    kind = _KINDS.get(name, name)
    return f"{action.option_strings[0]} {kind}{' ...' if action.nargs == '+' else ''}"


def _help(action: Any) -> str:
    default = getattr(action.default, "value", action.default)
    text = str(action.help or "").replace("%%", "%")
    return text if default is None else f"{text} (default: {default})"


def description(text: str | None, prog: str | None = None) -> str:
    """
    What stands at the head of a command's help, for 80 columns.

    Args:
        text (`str`, *optional*):
            Docstring of the command's module: paragraphs, lines of comment and command lines of Python.
        prog (`str`, *optional*):
            The command as it was called, which takes the place of `python -m MODULE`.

    Returns:
        `str`
    """
    blocks = []
    for block in (text or "").strip().split("\n\n"):
        lines: list[str] = []
        for line in block.splitlines():
            if lines and not line.startswith(("#", "python ")) and not lines[-1].startswith("#"):
                lines[-1] += f" {line.strip()}"
            else:
                lines.append(line)
        blocks.append("\n".join(_filled(" ".join(line.split()), prog) for line in lines))
    return "\n\n".join(blocks)


def _filled(line: str, prog: str | None) -> str:
    if not line.startswith("python -m "):
        return textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False)
    _, _, module, *words = line.split()
    head = prog.split() if prog else ["python", "-m", module]
    rows = textwrap.wrap(
        " ".join([*head, *words]), WIDTH - 2, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return " \\\n".join(rows)


def _entry(option: str, text: str) -> list[str]:
    head = textwrap.wrap(
        option, WIDTH, initial_indent="  ", subsequent_indent="      ", break_long_words=False, break_on_hyphens=False
    )
    if max(map(len, head)) > WIDTH:  # a list of choices, which breaks at its commas
        head = [line.replace(", ", ",") for line in textwrap.wrap(
            option.replace(",", ", "), WIDTH - 2, initial_indent="  ", subsequent_indent="      "
        )]  # fmt: skip
    indent = "      "
    return head + textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
