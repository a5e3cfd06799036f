"""What a run cannot do without, refused before a process starts or anything is loaded."""

from typing import Any

from .reading import RecipeError


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
