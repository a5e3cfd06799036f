"""What the scripts share: models, datasets and checkpoints from parsed arguments."""

from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers.trainer_utils import get_last_checkpoint

from .strict_parser import RecipeError


logger = get_logger(__name__)
PLAYGROUND = "playground"


def resolve_model(name: str | None) -> str:
    """
    The model to load; `"playground"` is the small base model that the package trains and caches.

    Raises:
        RecipeError: If no model is named.
    """
    if not name:
        raise RecipeError("`model_name_or_path` is missing. Name a model or a folder, or `playground`.")
    if name == PLAYGROUND:
        from ..playground import resolve

        return resolve(name)
    return name


def model_init_kwargs(model_args: Any, training_args: Any) -> dict[str, Any]:
    """Keywords for loading the model, those of `training_args.model_init_kwargs` last."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def load_datasets(script_args: Any, dataset_args: Any) -> Any:
    """
    The datasets that a recipe names: the mixture `datasets`, or `dataset_name`; `"playground"` is made on the spot.

    Raises:
        RecipeError: If none is named.
    """
    from datasets import load_dataset
    from trl import get_dataset

    if dataset_args.datasets:
        if script_args.dataset_name:
            logger.warning(f"`datasets` is given, so `dataset_name: {script_args.dataset_name}` is not used.")
        return get_dataset(dataset_args)
    if script_args.dataset_name == PLAYGROUND:
        from ..playground import load_playground_dataset

        return load_playground_dataset()
    if script_args.dataset_name:
        return load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    raise RecipeError("No data: set `dataset_name`, or `datasets` with a `path` for each.")


def last_checkpoint(training_args: Any) -> str | None:
    """
    The checkpoint to resume from: `resume_from_checkpoint` as a path, or, where it is `true`, the last one of the
    output folder.

    Raises:
        RecipeError: If it names no folder.
    """
    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        folder = training_args.output_dir
        return get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if not Path(wanted).is_dir():
        raise RecipeError(
            f"`resume_from_checkpoint: {wanted}` is not a folder. Give a `checkpoint-<step>` folder, or `true` for "
            f"the "
            "last one of `output_dir`."
        )
    return str(wanted)
