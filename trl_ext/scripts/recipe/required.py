"""What a run cannot do without, refused before a process starts or anything is loaded."""

import glob
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .overrides import BUILDERS
from .reading import RecipeError


# Setting: package that it needs, and how to install that
_PACKAGES = {
    "use_peft": ("peft", '"trl-ext[peft]"'),
    "load_in_4bit": ("bitsandbytes", "bitsandbytes"),
    "load_in_8bit": ("bitsandbytes", "bitsandbytes"),
    "deepspeed": ("deepspeed", '"trl-ext[deepspeed]"'),
    "use_vllm": ("vllm", "vllm"),
}
# Settings that name a model or a tokenizer: what its folder has to hold one of, and what that is called
_SAVED = {
    "model_name_or_path": (("config.json", "adapter_config.json"), "model"),
    "critic_model_name_or_path": (("config.json", "adapter_config.json"), "model"),
    "reward_funcs": (("config.json", "adapter_config.json"), "model"),
    "tokenizer_name_or_path": (("tokenizer*", "vocab*", "config.json"), "tokenizer"),
}


def require_packages(args: Any) -> None:
    """
    Refuses settings whose package is not installed.

    Args:
        args (`Any`):
            Parsed arguments.

    Raises:
        RecipeError: If one is missing.
    """
    for name, (package, installed_as) in _PACKAGES.items():
        value = getattr(args, name, None)
        if value and find_spec(package) is None:
            raise RecipeError(
                f"`{name}: {value}` needs {package}, which is not installed: pip install {installed_as}."
            )


def require_model_and_data(model_args: Any, script_args: Any, dataset_args: Any) -> None:
    """
    Refuses arguments that name no model or no data, before either is loaded.

    Raises:
        RecipeError: If one is missing.
    """
    if not model_args.model_name_or_path:
        raise RecipeError("`model_name_or_path` is missing. Name a model or a folder, or `playground`.")
    if not dataset_args.datasets and not script_args.dataset_name:
        raise RecipeError("No data: set `dataset_name`, or `datasets` with a `path` for each.")


def require_files(*arguments: Any) -> None:
    """
    Refuses data files, folders of models and of tokenizers that are not on this machine, before anything is loaded.
    What may be an id of the Hub is left to those who ask it.

    Args:
        arguments (`Any`):
            Parsed arguments, in one piece or several.

    Raises:
        RecipeError: If one is missing.
    """
    for one in arguments:
        for entry in getattr(one, "datasets", None) or ():
            stated = entry if isinstance(entry, dict) else vars(entry)
            if stated.get("path") in BUILDERS.values() and not stated.get("data_dir"):
                for file in _files(stated.get("data_files")):
                    _require_data(file)
        for key, (inside, what) in _SAVED.items():
            value = getattr(one, key, None)
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str):
                    _require_folder(key, name, inside, what)


def _files(data_files: Any) -> Iterator[str]:
    """Every file of `data_files`: a text, a list of them, or either for each split."""
    if isinstance(data_files, str):
        yield data_files
    elif isinstance(data_files, (list, dict)):
        for one in data_files.values() if isinstance(data_files, dict) else data_files:
            yield from _files(one)


def _require_data(file: str) -> None:
    if "://" not in file and not Path(file).exists() and not glob.glob(file, recursive=True):
        raise RecipeError(f"`data_files: {file}`: there is no such file in {Path.cwd()}. Make it, or give another.")


def _require_folder(key: str, name: str, inside: tuple[str, ...], what: str) -> None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any(any(folder.glob(pattern)) for pattern in inside):
            raise RecipeError(
                f"`{key}: {name}` is a folder without {inside[0].replace('*', '')}, so no {what} was saved in it. "
                "Name the folder that has it, such as a `checkpoint-<step>` below."
            )
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:  # no id of the Hub
        raise RecipeError(f"`{key}: {name}`: there is no such folder. Name one with a {what}, or an id of the Hub.")


def require_rewards(reward_funcs: Any) -> None:
    """
    Refuses a policy's training without a reward.

    Raises:
        RecipeError: If there is none.
    """
    if not reward_funcs:
        raise RecipeError("`reward_funcs` is missing. Name at least one reward function or reward model.")
