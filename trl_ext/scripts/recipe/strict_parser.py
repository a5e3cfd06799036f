"""A recipe parser that refuses what it does not know."""

import argparse
import dataclasses
import difflib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from copy import deepcopy
from datetime import date
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trl import TrlParser

from ...core.checks import described, fits, shown
from ...core.quiet import is_verbose, quiet_run
from ...core.status import RunError
from ...launcher import end_with_parent
from .environment import PRECISION, checked_environment, environment_kept_on_success, stated_precision
from .named_code import check_trust, named_code
from .overrides import apply_overrides, take_option
from .preview import given_text
from .reading import Lines, RecipeError, read_recipe
from .source_classes import stand_in


__all__ = ["RecipeError", "StrictParser", "convert", "load_recipe", "run_strictly", "take_flag"]
_COMMAND_LINE = "the command line"
# Unknown names that one error lists
_LISTED = 20
# Words that the parser takes for true and false, on the command line too
_BOOLEANS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True), **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}  # fmt: skip
# Class whose fields are the keys of a mapping, or of each in a list, that its field's type does not say
_KEYS_OF = {
    "constraints": ("trl_ext.constrained_ppo.constraints", "Constraint"),
    "search": ("trl_ext.constrained_ppo.threshold_search.config", "ThresholdSearchConfig"),
}
# Lists that TRL's configurations take one text for
_ONE_IS_A_LIST = ("loss_type", "lora_target_modules")


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
        with environment_kept_on_success(environment):
            try:
                parsed = self.parse_args_into_dataclasses(args=remaining, look_for_args_file=False)
            except RecipeError:
                raise
            except (ValueError, TypeError) as error:
                raise RecipeError(str(error)) from error
        for configuration in parsed:
            if hasattr(configuration, "output_dir"):  # the trainer's, which its card reads
                configuration.given_recipe = given_text(self)
        return parsed

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

    def check_settings(self, settings: dict[str, Any], path: str, lines: Lines) -> dict[str, Any]:
        """
        Refuses settings that a recipe could not hold and that stand in another file, such as a pipeline's.

        Args:
            settings (`dict[str, Any]`):
                Settings, without `env`.
            path (`str`):
                The file.
            lines (`dict`):
                Lines of the keys in it.

        Returns:
            `dict[str, Any]`: the settings, converted.

        Raises:
            RecipeError: If a key is unknown or a value has the wrong type.
        """
        self._refuse_unknown(settings, path, lines, [], ())
        return {key: self._checked(key, value, path, lines) for key, value in settings.items()}

    def _check(self, args: Iterable[str], other_options: Iterable[str] = ()) -> tuple[list[str], dict[str, str]]:
        remaining = list(args)
        path = take_option(remaining, "--config")
        trusted = take_flag(remaining, "--trust_recipe_code")
        self.verbose = take_flag(remaining, "--verbose") or is_verbose()
        recipe, lines = ({}, {}) if path is None else read_recipe(path)
        check_trust(recipe, lines, path, trusted)
        path = path or f"({_COMMAND_LINE[4:]})"
        stated = deepcopy(recipe)
        apply_overrides(recipe, remaining, self._field_types())
        environment = checked_environment(recipe.pop("env", None), path, lines)
        self._refuse_unknown(recipe, path, lines, remaining, other_options)
        self._take_texts_beside_flags()
        checked = {key: self._checked(key, value, path, lines) for key, value in recipe.items()}
        self.set_defaults_with_config(**checked)
        self.error = _refuse  # type: ignore[method-assign, assignment]
        parsed = self.parse_args(remaining)
        # What this run is about to import, for the command to say
        self.named_code = named_code(vars(parsed))
        self.parsed = parsed
        self.given = self._given(recipe, stated, path, remaining)
        precision = stated_precision(self._stated(checked, remaining, parsed))
        if precision is not None and os.environ.get(PRECISION, precision) != precision:
            environment[PRECISION] = precision
        return remaining, environment

    def _take_texts_beside_flags(self) -> None:
        """Lets a field of type `str | bool` take texts; the parent reads it as a flag alone."""
        for name, hint in self._field_types().items():
            if set(get_args(hint)) - {NoneType} == {str, bool}:
                self._option_string_actions[f"--{name}"].type = lambda text: _BOOLEANS.get(text.lower(), text)

    def _given(self, recipe: dict[str, Any], stated: dict[str, Any], path: str, args: list[str]) -> dict[str, str]:
        """Where each setting that is not default was given: the recipe's file, or the command line."""
        given = {
            key: path if key in stated and stated[key] == value else _COMMAND_LINE for key, value in recipe.items()
        }
        words = {argument.split("=", 1)[0] for argument in args}
        given |= {action.dest: _COMMAND_LINE for action in self._actions if words & set(action.option_strings)}
        return given

    @staticmethod
    def _stated(recipe: dict[str, Any], args: list[str], parsed: Any) -> dict[str, Any]:
        """`bf16` and `fp16`, as far as recipe or command line state them."""
        words = {argument.split("=", 1)[0].lstrip("-").removeprefix("no_") for argument in args}
        names = [name for name in ("bf16", "fp16") if name in recipe or name in words]
        return {name: getattr(parsed, name, None) for name in names}

    def _refuse_unknown(
        self, recipe: dict[str, Any], path: str, lines: Lines, args: list[str], other_options: Iterable[str]
    ) -> None:
        fields = self._field_types()
        known = set(fields) | {"env"}
        unknown = [(key, known, f"the recipe {path}{_line(lines, key)}") for key in recipe if key not in fields]
        for key, value in recipe.items():
            unknown += _unknown_inside(key, value, fields.get(key), path, lines)
        options = set(self._option_string_actions)
        suggested = {option[2:] for option in options if option[:2] == "--"} | set(other_options) | {"config"}
        suggested |= {"trust_recipe_code", "print_config", "dry_run"}
        for argument in args:
            option = argument.split("=")[0]
            if option.startswith("--") and option not in options:
                unknown.append((option[2:], suggested, "the command line"))
        if unknown:
            listed = [
                f"`{_cut(key)}` in {source}{_suggestion(key, valid)}" for key, valid, source in unknown[:_LISTED]
            ]
            listed += [f"and {len(unknown) - _LISTED} more"] if len(unknown) > _LISTED else []
            raise RecipeError("Unknown arguments:\n  " + "\n  ".join(listed) + "\nRename or remove them.")

    def _checked(self, key: str, value: Any, path: str, lines: Lines) -> Any:
        hint = self._field_types()[key]
        action = self._option_string_actions[f"--{key}"]
        if value is None and action.default is None:
            return None
        stated = "..." if key == "hub_token" else shown(value)
        where = f"`{key}: {stated}` in the recipe {path}{_line(lines, key)}"
        if key in _ONE_IS_A_LIST and isinstance(value, str) and _is_list(hint):
            value = [value]
        try:
            value = convert(value, hint)
        except (TypeError, ValueError, LookupError, OverflowError):
            remedy = f" Write `{key}: [{value}]`." if isinstance(value, str) and _is_list(hint) else ""
            raise RecipeError(f"{where} must be of type {_type_name(hint)}: {described(hint)}.{remedy}") from None
        if action.choices is not None and value is not None and value not in action.choices:
            quote = " YAML reads an unquoted no, off, yes or on as a boolean: quote it." * isinstance(value, bool)
            raise RecipeError(f"{where} must be one of {list(action.choices)}.{quote}")
        if isinstance(value, str) and action.choices is None and callable(action.type):
            try:
                action.type(value)  # as argparse will, whose error would not say where the value stands
            except (argparse.ArgumentTypeError, TypeError, ValueError):
                raise RecipeError(f"{where} must be of type {_type_name(hint)}: {described(hint)}.") from None
        nested = _nested_dataclass(hint)
        for position, entry in enumerate(value) if nested is not None and isinstance(value, list) else ():
            missing = _required(nested) - set(entry)
            if missing:
                line = _line(lines, key, position)
                raise RecipeError(
                    f"An entry of `{key}` in the recipe {path}{line} lacks {sorted(missing)}: {shown(entry)}."
                )
        return value

    def _field_types(self) -> dict[str, Any]:
        """Name and type of every field that a recipe may set."""
        return _types_of(tuple(self.dataclass_types))


@functools.cache
def _types_of(dataclass_types: tuple[Any, ...]) -> dict[str, Any]:
    return {
        field.name: hints[field.name]
        for dataclass in dataclass_types
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
        ValueError or TypeError or KeyError: If the field cannot take the value.
    """
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [member for member in members if member is not NoneType]
    if value is None or (isinstance(value, str) and str not in kinds and value.lower() in ("none", "null")):
        if len(kinds) == len(members):
            raise TypeError("None")
        return None
    if len(kinds) != 1:
        if not fits(value, hint) and not _has_choices(kinds):
            raise TypeError("none of several types")
        return value
    kind = kinds[0]
    if get_origin(kind) is list or kind is list:
        if not isinstance(value, list):
            raise TypeError("no list")
        inner = get_args(kind)[0] if get_args(kind) else Any
        return [_converted_entry(entry, inner) for entry in value]
    if kind not in (bool, int, float, str):
        if not fits(value, kind) and not _has_choices(kinds):
            raise TypeError("another type")
        return value
    if not isinstance(value, (bool, int, float, str, date)):
        raise TypeError("not a single value")
    if kind is str:
        return str(value)
    if kind is bool:
        return _BOOLEANS[str(value).lower()]
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
        raise TypeError("another type of number")
    return value if kind is float and isinstance(value, int) else kind(value)


def _converted_entry(entry: Any, inner: Any) -> Any:
    """An entry of a list, converted; of a mapping that stands for a dataclass, each of its values."""
    if not dataclasses.is_dataclass(inner):
        return convert(entry, inner)
    hints = get_type_hints(inner)
    return {name: convert(value, hints[name]) for name, value in entry.items()}


def _is_list(hint: Any) -> bool:
    return any(get_origin(member) is list for member in (hint, *get_args(hint)))


def _has_choices(kinds: list[Any]) -> bool:
    """Whether argparse knows the choices, whose error lists them."""
    return any(get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)) for kind in kinds)


def load_recipe(path: str | Path) -> dict[str, Any]:
    """
    Reads a recipe.

    Args:
        path (`str` or `Path`):
            YAML file with a mapping, or the name of a packaged recipe, such as `sparse_po/playground`.

    Returns:
        `dict[str, Any]`

    Raises:
        RecipeError: As [`read_recipe`] does.
    """
    return read_recipe(path)[0]


def take_flag(args: list[str], name: str) -> bool:
    """Takes a flag, alone or with `true` or `false`, out of a list of arguments; whether it is set."""
    found = False
    for position in reversed([index for index, argument in enumerate(args) if argument.split("=", 1)[0] == name]):
        argument = args.pop(position)
        value = argument.partition("=")[2]
        if not value and position < len(args) and args[position].lower() in ("true", "false"):
            value = args.pop(position)
        found = value.lower() != "false"
    return found


def _line(lines: Lines, *place: Any) -> str:
    line = lines.get(tuple(part if isinstance(part, int) else str(part) for part in place))
    return f", line {line}" if line else ""


def _cut(key: Any) -> str:
    return str(key) if len(str(key)) <= 80 else f"{str(key)[:80]}..."


def _type_name(hint: Any) -> Any:
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else hint


def _refuse(message: str) -> None:
    raise RecipeError(f"{message}. Run with --help for the arguments and their types.")


def _suggestion(key: Any, valid: Iterable[str]) -> str:
    name = str(key).split(".")[0]
    close = difflib.get_close_matches(name[:80], sorted(valid), n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else ""


def _nested_dataclass(hint: Any) -> Any:
    """The dataclass of a field that lists instances of one."""
    members = get_args(hint) if get_origin(hint) is list else ()
    return members[0] if members and dataclasses.is_dataclass(members[0]) else None


def _unknown_inside(key: str, value: Any, hint: Any, path: str, lines: Lines) -> list[tuple[Any, set[str], str]]:
    """Of a field of mappings whose keys are known: each key that is none, what is valid, and where it stands."""
    nested = _nested_dataclass(hint)
    if nested is None and key in _KEYS_OF and hint is not None:
        nested = stand_in(*_KEYS_OF[key])
    if nested is None or not isinstance(value, (list, dict)):
        return []
    names = {field.name for field in dataclasses.fields(nested)}
    found = []
    for position, entry in enumerate(value) if isinstance(value, list) else [(None, value)]:
        place = (key,) if position is None else (key, position)
        name = f"`{key}`" if position is None else f"`{key}[{position}]`"
        if not isinstance(entry, dict):
            where = f"{name} in the recipe {path}{_line(lines, *place)}"
            raise RecipeError(f"{where} must be a mapping, got {shown(entry)}.")
        found += [
            (inner, names, f"{name} of the recipe {path}{_line(lines, *place, inner)}")
            for inner in entry if inner not in names
        ]  # fmt: skip
    return found


def _required(dataclass: Any) -> set[str]:
    return {
        field.name
        for field in dataclasses.fields(dataclass)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }


def _says_it_all(error: Exception) -> bool:
    """Whether an error is a library's own words about a model or data that it could not load, before training."""
    trained = any(frame.name == "train" for frame in traceback.extract_tb(error.__traceback__))
    return isinstance(error, OSError) and error.errno is None and not trained


def run_strictly(make_parser: Callable[[], StrictParser], main: Callable[..., None]) -> None:
    """Parses the process's arguments and runs `main` on them; a refused recipe ends the process with its message."""
    end_with_parent()
    parser = None
    try:
        with quiet_run(verbose=take_flag(sys.argv[1:], "--verbose")):
            parser = make_parser()  # which imports libraries that speak as they are imported
            main(*parser.parse_args_and_config())
    except (RecipeError, RunError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
    except Exception as error:
        from ...core.files import is_lack_of_space  # which imports torch

        if _says_it_all(error) and not take_flag(sys.argv[1:], "--verbose"):
            model = getattr(getattr(parser, "parsed", None), "model_name_or_path", None)
            given = f"Given is `model_name_or_path: {model}`. " if model else ""  # which transformers may not name
            raise SystemExit(f"{Path(sys.argv[0]).name}: {error}\n{given}--verbose shows where.") from None
        if not is_lack_of_space(error):
            raise
        raise SystemExit(
            f"{Path(sys.argv[0]).name}: The disk is full ({error}). Make room, and go on with "
            "`resume_from_checkpoint: true`."
        ) from None
