"""Command-line options that reach into a recipe's nested fields.

--constraints '[{"reward": "length", "threshold": 200, "kind": "<="}]'      a whole field as JSON or YAML
--constraints.0.threshold 0.5                                              one value in it
--dataset_name NAME, --data_files FILE                                     in place of the recipe's `datasets`
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from ...core.checks import shown
from .reading import RecipeError, parse_yaml


# Ending of a file: what `datasets` reads it with
BUILDERS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".arrow": "arrow",
}  # fmt: skip


def is_nested(hint: Any) -> bool:
    """Whether a field holds mappings, alone or in a list, which argparse cannot read."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [member for member in members if member is not NoneType]
    if len(kinds) != 1:
        return False
    kind = get_args(kinds[0])[0] if get_origin(kinds[0]) is list and get_args(kinds[0]) else kinds[0]
    return (get_origin(kind) or kind) is dict or dataclasses.is_dataclass(kind)


def apply_overrides(recipe: dict[str, Any], args: list[str], hints: Mapping[str, Any]) -> None:
    """
    Moves what a command line says of nested fields into a recipe.

    Args:
        recipe (`dict[str, Any]`):
            The recipe, changed in place.
        args (`list[str]`):
            The command line; what is moved is taken out.
        hints (`Mapping[str, Any]`):
            Type of each field.

    Raises:
        RecipeError: If an option has no value, is no JSON, or names a place that the recipe does not have.
    """
    _replace_datasets(recipe, args, hints)
    kept: list[str] = []
    while args:
        option = args.pop(0)
        name, equals, inline = option[2:].partition("=") if option.startswith("--") else ("", "", "")
        first, *path = name.split(".")
        field = first.replace("-", "_")
        if not (field in hints or field == "env") or not (path or is_nested(hints.get(field))):
            kept.append(option)
            continue
        values = [inline] if equals else _values(args)
        if not values:
            raise RecipeError(f"`{option}` needs a value.")
        if path:
            if len(values) > 1:
                values = [f"[{', '.join(values)}]"]
            _set(recipe, [field, *path], parse_value(values[0]), f"--{name}", hints.get(field))
        else:
            recipe[field] = _whole(values, hints[field], f"--{name}")
    args[:] = kept


def parse_value(text: str) -> Any:
    """A value of a command line as YAML reads it, which JSON is; `1e-3` is a number too."""
    try:
        value = _json_or_yaml(text)
    except RecipeError:
        return text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _json_or_yaml(text: str) -> Any:
    """JSON first, whose `1e-3` is a number."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return parse_yaml(text, "command line")[0]


def _values(args: list[str]) -> list[str]:
    found = []
    while args and not args[0].startswith("--"):
        found.append(args.pop(0))
    return found


def _whole(texts: list[str], hint: Any, option: str) -> Any:
    values = []
    for text in texts:
        try:
            values.append(_json_or_yaml(text))
        except RecipeError as error:
            raise RecipeError(f"`{option} {text}` is neither JSON nor YAML: {error}") from error
    wants_list = list in {get_origin(member) for member in (hint, *get_args(hint))}
    if not wants_list:
        return values[0]
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _set(recipe: dict[str, Any], path: list[str], value: Any, option: str, hint: Any) -> None:
    """Sets one value; a list grows by one entry where its length is the index."""
    is_list = list in {get_origin(member) for member in (hint, *get_args(hint))}
    place: Any = recipe
    for depth, part in enumerate(path):
        last, key = depth == len(path) - 1, part
        if isinstance(place, list):
            key = _index(place, part, option, ".".join(path[:depth]))  # type: ignore[assignment]
        elif not isinstance(place, dict):
            raise RecipeError(f"`{option}`: `{'.'.join(path[:depth])}` is {shown(place)}, which has no parts.")
        if last:
            place[key] = value
            return
        if isinstance(place, list) or place.get(key) is not None:
            place = place[key]
            continue
        place[key] = [] if depth == 0 and is_list else {}
        place = place[key]


def _index(entries: list[Any], part: str, option: str, name: str) -> int:
    if not part.isdigit() or int(part) > len(entries):
        raise RecipeError(
            f"`{option}`: `{name}` has {len(entries)} entries, the first of them 0, and {part!r} is none. Give one of "
            f"them, or {len(entries)} for a new one."
        )
    if int(part) == len(entries):
        entries.append({})
    return int(part)


def _replace_datasets(recipe: dict[str, Any], args: list[str], hints: Mapping[str, Any]) -> None:
    """`--dataset_name` and `--data_files` win over the `datasets` of a recipe."""
    if "datasets" not in hints:
        return
    if any(argument.split("=", 1)[0] in ("--dataset_name", "--dataset-name") for argument in args):
        recipe.pop("datasets", None)
    files = None if "data_files" in hints else take_option(args, "--data_files")
    if files is None:
        return
    datasets = recipe.get("datasets")
    if not datasets:
        recipe["datasets"] = [{"path": reader_of(files), "data_files": files}]
    elif isinstance(datasets, list) and len(datasets) == 1 and isinstance(datasets[0], dict):
        if datasets[0].get("path") not in BUILDERS.values() and Path(files).is_file():
            datasets[0]["path"] = reader_of(files)  # a file here in place of a data set of the Hub
        datasets[0]["data_files"] = files
    else:
        raise RecipeError(
            f"`--data_files {files}`: the recipe has several `datasets`. Give `--datasets.0.data_files`."
        )


def reader_of(files: str) -> str:
    """
    What [`~datasets.load_dataset`] reads files of data by.

    Args:
        files (`str`):
            Path or pattern of paths, maybe of files packed by gzip.

    Returns:
        `str`: such as `"json"`.

    Raises:
        RecipeError: If the ending is not known.
    """
    name = PurePath(files.lower().removesuffix(".gz"))
    if name.suffix not in BUILDERS:
        raise RecipeError(f"`--data_files {files}` must end in one of {', '.join(BUILDERS)}, or that and .gz.")
    return BUILDERS[name.suffix]


def take_option(args: list[str], name: str) -> str | None:
    """
    Takes `--name value` or `--name=value` out of a list of arguments.

    Args:
        args (`list[str]`):
            Arguments, shortened in place.
        name (`str`):
            The option, with its `--`.

    Returns:
        `str` or `None`: its value, or `None` where it is not given.

    Raises:
        RecipeError: If it has no value or is given twice.
    """
    positions = [index for index, argument in enumerate(args) if argument.split("=", 1)[0] == name]
    if not positions:
        return None
    if len(positions) > 1:
        raise RecipeError(f"`{name}` is given twice. Keep one.")
    position = positions[0]
    argument = args.pop(position)
    if "=" in argument:
        return argument.split("=", 1)[1]
    if position == len(args):
        raise RecipeError(f"`{name}` needs a value.")
    return args.pop(position)
