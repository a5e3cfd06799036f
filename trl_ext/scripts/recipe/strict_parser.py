"""A recipe parser that refuses what it does not know."""

import dataclasses
import difflib
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import string_to_bool
from trl import TrlParser

from ...core.files import is_lack_of_space
from ...core.status import RunError
from ...launcher import end_with_parent
from .packaged import find_packaged


class RecipeError(ValueError):
    """A recipe or command line that cannot be run as written."""


class StrictParser(TrlParser):
    """
    [`~trl.TrlParser`] that refuses unknown and repeated keys, before any model or dataset is loaded.

    TRL's own scripts ignore misspelt recipe keys under `accelerate launch`.
    """

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """
        Parses the command line and the recipe given with `--config`; the command line wins. Where all is accepted, the
        recipe's `env` is in the environment before any configuration is built, since that starts the devices.

        Args:
            args (`Iterable[str]`, *optional*):
                Arguments. Defaults to the process's own.
            return_remaining_strings (`bool`, *optional*, defaults to `False`):
                Not supported: nothing is left over.
            fail_with_unknown_args (`bool`, *optional*, defaults to `True`):
                Must be `True`.
            separate_remaining_strings (`bool`, *optional*, defaults to `False`):
                Not supported.

        Returns:
            `tuple`: one instance of each dataclass.

        Raises:
            RecipeError: If a key is unknown or given twice, a value has the wrong type, or the recipe is not a file.
        """
        if return_remaining_strings or separate_remaining_strings or not fail_with_unknown_args:
            raise ValueError("`StrictParser` refuses unknown arguments; leave `fail_with_unknown_args=True`.")
        remaining, environment = self._check(sys.argv[1:] if args is None else args)
        with _environment_kept_on_success(environment):
            return self.parse_args_into_dataclasses(args=remaining, look_for_args_file=False)

    def check(self, args: Iterable[str], other_options: Iterable[str] = ()) -> dict[str, str]:
        """
        Refuses an unusable recipe or command line as [`parse_args_and_config`] does, but builds no configuration, so
        that it can be called where the training machine's devices are missing.

        Args:
            args (`Iterable[str]`):
                Arguments.
            other_options (`Iterable[str]`, *optional*):
                Names of options that the caller took out of `args`, to suggest them where a name is misspelt.

        Returns:
            `dict[str, str]`: the recipe's `env`, which is not set here.

        Raises:
            RecipeError: If a key is unknown or given twice, a value has the wrong type, or the recipe is not a file.
        """
        return self._check(args, other_options)[1]

    def _check(self, args: Iterable[str], other_options: Iterable[str] = ()) -> tuple[list[str], dict[str, str]]:
        remaining = list(args)
        path = take_option(remaining, "--config")
        recipe = {} if path is None else load_recipe(path)
        environment = recipe.pop("env", None) or {}
        if not isinstance(environment, dict):
            raise RecipeError(f"`env` in {path} must map names to values, got {environment!r}.")
        self._refuse_unknown(recipe, path, remaining, other_options)
        self.set_defaults_with_config(**{key: self._checked(key, value, path) for key, value in recipe.items()})
        self.error = _refuse  # type: ignore[method-assign, assignment]
        self.parse_args(remaining)
        return remaining, {str(name): str(value) for name, value in environment.items()}

    def _refuse_unknown(
        self, recipe: dict[str, Any], path: str | None, args: list[str], other_options: Iterable[str]
    ) -> None:
        fields = self._field_types()
        unknown = [(key, set(fields) | {"env"}, f"the recipe {path}") for key in recipe if key not in fields]
        for key, value in recipe.items():
            nested = _nested_dataclass(fields.get(key))
            if nested is None or not isinstance(value, list):
                continue
            names = {field.name for field in dataclasses.fields(nested)}
            for position, entry in enumerate(value):
                if not isinstance(entry, dict):
                    raise RecipeError(f"`{key}[{position}]` in the recipe {path} must be a mapping, got {entry!r}.")
                unknown += [
                    (name, names, f"`{key}[{position}]` of the recipe {path}") for name in entry if name not in names
                ]
        options = set(self._option_string_actions)
        suggested = {option[2:] for option in options if option[:2] == "--"} | set(other_options) | {"config"}
        for argument in args:
            option = argument.split("=")[0]
            if option.startswith("--") and option not in options:
                unknown.append((option[2:], suggested, "the command line"))
        if unknown:
            lines = [f"`{key}` in {source}{_suggestion(str(key), valid)}" for key, valid, source in unknown]
            raise RecipeError("Unknown arguments:\n  " + "\n  ".join(lines) + "\nRename or remove them.")

    def _checked(self, key: str, value: Any, path: str | None) -> Any:
        hint = self._field_types()[key]
        action = self._option_string_actions[f"--{key}"]
        if value is None and action.default is None:
            return None
        where = f"`{key}: {value!r}` in the recipe {path}"
        try:
            value = convert(value, hint)
        except (ArgumentTypeError, TypeError, ValueError):
            expected = getattr(hint, "__name__", None) if isinstance(hint, type) else hint
            raise RecipeError(f"{where} must be of type {expected}.") from None
        if action.choices is not None and value is not None and value not in action.choices:
            quote = " YAML reads an unquoted no, off, yes or on as a boolean: quote it." * isinstance(value, bool)
            raise RecipeError(f"{where} must be one of {list(action.choices)}.{quote}")
        nested = _nested_dataclass(hint)
        for entry in value if nested is not None and isinstance(value, list) else ():
            missing = _required(nested) - set(entry)
            if missing:
                raise RecipeError(f"An entry of `{key}` in the recipe {path} lacks {sorted(missing)}: {entry!r}.")
        return value

    def _field_types(self) -> dict[str, Any]:
        """Name and type of every field that a recipe may set."""
        return {
            field.name: hints[field.name]
            for dataclass in self.dataclass_types
            for hints in [get_type_hints(dataclass)]
            for field in dataclasses.fields(dataclass)
            if field.init
        }


def convert(value: Any, hint: Any) -> Any:
    """
    The value of a recipe as a field takes it: `1e-6`, which YAML reads as text, becomes a number, and `3.0` a whole
    number where one is wanted. What takes other types than one plain one, and `None`, is left to the configuration.

    Args:
        value (`Any`):
            Value as YAML reads it.
        hint (`Any`):
            Type of the field.

    Returns:
        `Any`

    Raises:
        ValueError or TypeError or ArgumentTypeError: If the field cannot take the value.
    """
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [member for member in members if member is not NoneType]
    if value is None or (isinstance(value, str) and str not in kinds and value.lower() in ("none", "null")):
        if len(kinds) == len(members):
            raise TypeError("None")
        return None
    if len(kinds) != 1 or kinds[0] not in (bool, int, float, str):
        return value
    kind = kinds[0]
    if isinstance(value, (list, dict)):
        raise TypeError("not a single value")
    if kind is str:
        return str(value)
    if kind is bool:
        return string_to_bool(str(value))
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
        raise TypeError("another type of number")
    return value if kind is float and isinstance(value, int) else kind(value)


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


def load_recipe(path: str | Path) -> dict[str, Any]:
    """
    Reads a recipe.

    Args:
        path (`str` or `Path`):
            YAML file with a mapping, or the name of a packaged recipe, such as `sparse_po/playground`.

    Returns:
        `dict[str, Any]`

    Raises:
        RecipeError: If it is no file, no YAML mapping, or has a key twice.
    """
    file = Path(path) if Path(path).is_file() else find_packaged(path)
    if file is None:
        raise RecipeError(f"`--config {path}` is not a file. `trl-ext recipes` lists the recipes.")
    try:
        recipe = yaml.load(file.read_text(), Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe {path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"The recipe {path} must be a mapping of arguments to values, got {type(recipe).__name__}.")
    # A packaged recipe names a packaged DeepSpeed config
    return {key: _packaged_file(value) if key == "deepspeed" else value for key, value in recipe.items()}


def _packaged_file(value: Any) -> Any:
    if not isinstance(value, str) or Path(value).is_file():
        return value
    return str(find_packaged(value) or value)


def _refuse(message: str) -> None:
    raise RecipeError(f"{message}. Run with --help for the arguments and their types.")


def _suggestion(key: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, sorted(valid), n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else ""


def _nested_dataclass(hint: Any) -> Any:
    """The dataclass of a field that lists instances of one."""
    members = get_args(hint) if get_origin(hint) is list else ()
    return members[0] if members and dataclasses.is_dataclass(members[0]) else None


def _required(dataclass: Any) -> set[str]:
    return {
        field.name
        for field in dataclasses.fields(dataclass)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }


@contextmanager
def _environment_kept_on_success(environment: dict[str, str]) -> Iterator[None]:
    previous = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    except BaseException:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        raise


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = {key for key in keys if keys.count(key) > 1}
        if repeated:
            raise yaml.YAMLError(
                f"{sorted(map(str, repeated))} given twice, line {node.start_mark.line + 1} and below"
            )
        return super().construct_mapping(node, deep)


def run_strictly(parser: StrictParser, main: Callable[..., None]) -> None:
    """Parses the process's arguments and runs `main` on them; a refused recipe ends the process with its message."""
    end_with_parent()
    try:
        main(*parser.parse_args_and_config())
    except (RecipeError, RunError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
    except Exception as error:
        if not is_lack_of_space(error):
            raise
        raise SystemExit(
            f"{Path(sys.argv[0]).name}: The disk is full ({error}). Make room, and go on with "
            "`resume_from_checkpoint: true`."
        ) from None
