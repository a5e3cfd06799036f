"""Code that a recipe names: what it is, whether it may run, and its import, with errors that say whose they are.

A recipe is code: `reward_funcs` and `gold_reward` name modules, which are imported, and `trust_remote_code` runs what
a model's repository brings.
"""

import difflib
import importlib
import os
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .packaged import find_packaged
from .reading import Lines, RecipeError


# Keys whose texts are dotted paths of functions, or models
_FUNCTION_KEYS = ("reward_funcs", "gold_reward")
# Modules that are installed with this package
_OURS = ("trl_ext.", "trl.")


def is_dotted_path(name: Any) -> bool:
    """Whether a reward's name is the dotted path of a function, and not a model's id or folder."""
    return isinstance(name, str) and "." in name and all(part.isidentifier() for part in name.split("."))


def named_code(settings: Mapping[str, Any]) -> list[str]:
    """
    What settings will import beyond the installed packages, in words.

    Args:
        settings (`Mapping[str, Any]`):
            A recipe, or parsed arguments.

    Returns:
        `list[str]`: such as `"the module myrewards (reward_funcs)"`.
    """
    found: dict[str, None] = {}
    for key in _FUNCTION_KEYS:
        value: Any = settings.get(key)
        for name in value if isinstance(value, list) else [value]:
            if is_dotted_path(name) and not str(name).startswith(_OURS):
                found[f"the module {str(name).rpartition('.')[0]} ({key})"] = None
    if str(settings.get("trust_remote_code")).lower() == "true":
        found["code from the model's repository (trust_remote_code)"] = None
    return list(found)


def check_trust(recipe: Mapping[str, Any], lines: Lines, path: str | None, trusted: bool) -> None:
    """
    Refuses a recipe from elsewhere that would run code.

    Args:
        recipe (`Mapping[str, Any]`):
            The recipe.
        lines (`dict`):
            Lines of its keys.
        path (`str` or `None`):
            Its file.
        trusted (`bool`):
            Whether the user trusts its code.

    Raises:
        RecipeError: If the recipe lies outside the working folder, names code, and is not trusted.
    """
    if path is None or trusted or not Path(path).is_file():
        return  # a packaged recipe, by its name
    file = Path(path).resolve()
    packaged = find_packaged(path)
    if file.is_relative_to(Path.cwd().resolve()) or (packaged is not None and packaged == file):
        return
    code = named_code(recipe)
    if code:
        key = code[0].rpartition("(")[2].rstrip(")")
        line = lines.get((key,))
        raise RecipeError(
            f"The recipe {path}{f', line {line},' if line else ''} lies outside the working folder and would run "
            f"{' and '.join(code)}. Read it, then add `--trust_recipe_code`, or move it here."
        )


def announcement(code: list[str]) -> str:
    """One line that says what is about to be imported; empty where there is nothing to say."""
    return f"This run imports {' and '.join(code)}." if code else ""


def load_function(name: str, key: str) -> Any:
    """
    The function of a dotted path; the path of the module is said before it is imported.

    Args:
        name (`str`):
            Dotted path, such as `myrewards.length`.
        key (`str`):
            Key of the recipe that names it.

    Returns:
        `Callable`

    Raises:
        RecipeError: If there is no such module or function, or the module cannot be imported.
    """
    module_name, _, function_name = name.rpartition(".")
    where = f"`{key}: {name}`"
    if not name.startswith(_OURS) and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{where}: importing the module {module_name}.\n")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise RecipeError(
                f"{where}: the module {module_name} cannot be imported, because it imports {error.name!r}, which is "
                f"not installed. Install that ({error})."
            ) from error
        raise RecipeError(
            f"{where}: there is no module {error.name!r}{_closest_module(error.name)} Run from the folder that has "
            "it, or install it; a reward model is a folder or an id of the form `owner/name`."
        ) from error
    except Exception as error:  # whatever a user's module raises while it is imported
        raise RecipeError(
            f"{where}: the module {module_name} cannot be imported: {type(error).__name__}: {str(error)[:500]}"
        ) from error
    if not callable(getattr(module, function_name, None)):
        callables = [each for each in dir(module) if callable(getattr(module, each)) and not each.startswith("_")]
        close = difflib.get_close_matches(function_name, callables, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise RecipeError(f"{where}: the module {module_name} has no function {function_name!r}{hint}")
    return getattr(module, function_name)


def _closest_module(missing: str) -> str:
    parent, _, last = missing.rpartition(".")
    places = list(getattr(sys.modules.get(parent), "__path__", [])) if parent else None
    names = [module.name for module in pkgutil.iter_modules(places)]
    close = difflib.get_close_matches(last, names, n=1, cutoff=0.75)
    return f"; did you mean {'.'.join(filter(None, (parent, close[0])))!r}?" if close else "."
