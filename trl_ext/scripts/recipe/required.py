"""What a run cannot do without, refused before a process starts or anything is loaded."""

from importlib.util import find_spec
from typing import Any

from .reading import RecipeError


# Setting: package that it needs, and how to install that
_PACKAGES = {
    "use_peft": ("peft", '"trl-ext[peft]"'),
    "load_in_4bit": ("bitsandbytes", "bitsandbytes"),
    "load_in_8bit": ("bitsandbytes", "bitsandbytes"),
    "deepspeed": ("deepspeed", '"trl-ext[deepspeed]"'),
    "use_vllm": ("vllm", "vllm"),
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


def require_rewards(reward_funcs: Any) -> None:
    """
    Refuses a policy's training without a reward.

    Raises:
        RecipeError: If there is none.
    """
    if not reward_funcs:
        raise RecipeError("`reward_funcs` is missing. Name at least one reward function or reward model.")
