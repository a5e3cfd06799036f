"""A recipe parser that refuses what it does not know."""

import difflib
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser


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
        Parses the command line and the recipe given with `--config`; the command line wins.

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
        remaining, recipe, environment, path = self._read(sys.argv[1:] if args is None else args)
        self.set_defaults_with_config(**recipe)
        output = self._parse(remaining, recipe, path)
        os.environ.update(environment)
        return output

    def check(self, args: Iterable[str]) -> None:
        """
        Refuses an unusable recipe or command line as [`parse_args_and_config`] does, but builds no configuration, so
        that it can be called where the training machine's devices are missing.

        Args:
            args (`Iterable[str]`):
                Arguments.

        Raises:
            RecipeError: If a key is unknown or given twice, a value has the wrong type, or the recipe is not a file.
        """
        remaining, recipe, _, path = self._read(args)
        self.set_defaults_with_config(**recipe)
        self._check_recipe_types(recipe, path)
        self.error = _refuse  # type: ignore[method-assign, assignment]
        self.parse_args(remaining)

    def _read(self, args: Iterable[str]) -> tuple[list[str], dict[str, Any], dict[str, str], str | None]:
        args = list(args)
        recipe: dict[str, Any] = {}
        path = None
        if "--config" in args:
            position = args.index("--config")
            if position + 1 >= len(args):
                raise RecipeError("`--config` needs the path of a recipe.")
            path = args[position + 1]
            del args[position : position + 2]
            recipe = load_recipe(path)
        environment = recipe.pop("env", {}) or {}
        if not isinstance(environment, dict):
            raise RecipeError(f"`env` in {path} must map names to values, got {environment!r}.")
        self._refuse_unknown(
            [(key, f"the recipe {path}") for key in recipe]
            + [(argument[2:].split("=")[0], "the command line") for argument in _flags(args)]
        )
        return args, recipe, {str(name): str(value) for name, value in environment.items()}, path

    def valid_keys(self) -> set[str]:
        """Names that a recipe or, behind `--`, the command line may use."""
        options = {option[2:] for action in self._actions for option in action.option_strings if option[:2] == "--"}
        return {action.dest for action in self._actions} | options | {"env", "config"}

    def _refuse_unknown(self, keys: list[tuple[str, str]]) -> None:
        valid = self.valid_keys()
        lines = []
        for key, source in keys:
            if key not in valid and key.replace("-", "_") not in valid:
                close = difflib.get_close_matches(key, sorted(valid), n=1, cutoff=0.5)
                lines.append(f"`{key}` in {source}" + (f"; did you mean `{close[0]}`?" if close else ""))
        if lines:
            raise RecipeError("Unknown arguments:\n  " + "\n  ".join(lines) + "\nRename or remove them.")

    def _parse(self, args: list[str], recipe: dict[str, Any], path: str | None) -> tuple[Any, ...]:
        self.error = _refuse  # type: ignore[method-assign, assignment]
        self._check_recipe_types(recipe, path)
        return self.parse_args_into_dataclasses(args=args)

    def _check_recipe_types(self, recipe: dict[str, Any], path: str | None) -> None:
        """argparse converts defaults only if they are strings, so a value of another type would slip through."""
        for action in self._actions:
            value = recipe.get(action.dest)
            if value is None or isinstance(value, (dict, list)):
                continue
            numeric = action.type in (int, float) and isinstance(value, (bool, str))
            try:
                if numeric:
                    if isinstance(value, bool):
                        raise ArgumentError(None, "a boolean")
                    recipe_value = action.type(value)  # type: ignore[operator]
                    self.set_defaults_with_config(**{action.dest: recipe_value})
                elif action.type is int and isinstance(value, float) and not value.is_integer():
                    raise ArgumentError(None, "not whole")
            except (ArgumentError, TypeError, ValueError):
                raise RecipeError(
                    f"`{action.dest}: {value!r}` in the recipe {path} must be of type "
                    f"{getattr(action.type, '__name__', action.type)}."
                ) from None
            if action.choices is not None and value not in action.choices:
                raise RecipeError(f"`{action.dest}: {value!r}` in the recipe {path} must be one of {action.choices}.")


def load_recipe(path: str | Path) -> dict[str, Any]:
    """
    Reads a recipe.

    Args:
        path (`str` or `Path`):
            YAML file with a mapping.

    Returns:
        `dict[str, Any]`

    Raises:
        RecipeError: If it is no file, no YAML mapping, or has a key twice.
    """
    if not Path(path).is_file():
        raise RecipeError(f"`--config {path}` is not a file. `trl-ext recipes` lists the recipes.")
    try:
        recipe = yaml.load(Path(path).read_text(), Loader=_UniqueKeyLoader)  # noqa: S506
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe {path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"The recipe {path} must be a mapping of arguments to values, got {type(recipe).__name__}.")
    return recipe


def _refuse(message: str) -> None:
    raise RecipeError(f"{message}. Run with --help for the arguments and their types.")


def _flags(args: list[str]) -> list[str]:
    return [argument for argument in args if argument.startswith("--") and argument != "--help"]


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
    try:
        parsed = parser.parse_args_and_config()
    except RecipeError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
    main(*parsed)
