"""What the scripts share: models, datasets and checkpoints from parsed arguments."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger

from ...core.agreement import end_processes
from ...core.checkpoint import checkpoints
from . import required
from .strict_parser import RecipeError


logger = get_logger(__name__)
PLAYGROUND = "playground"
PLAYGROUND_MODELS = (PLAYGROUND, "playground-small")  # those of `trl_ext.playground.MODELS`
_SPLIT_SEED = 42
# What trainers and their callbacks leave in the output folder
_LEFT_BEHIND = {
    "model card": "README.md",
    "dashboard": "dashboard.png",
    "gradients": "alignment.png",
    "token masks": "token_masks",
    "optimizer": "optimizer_report.json",
    "log": "trainer_state.json",
}


def require_model_and_data(model_args: Any, script_args: Any, dataset_args: Any) -> None:
    """
    Refuses arguments without model or data, or with files that are not here, before anything is loaded or trained.

    Raises:
        RecipeError: If one is missing.
    """
    required.require_model_and_data(model_args, script_args, dataset_args)
    required.require_files(model_args, dataset_args)


def resolve_model(name: str) -> str:
    """The model to load; those of the playground are trained by the package and cached."""
    if name in PLAYGROUND_MODELS:
        from ...playground import resolve

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


@contextmanager
def one_split() -> Iterator[None]:
    """
    Has [`~trl.get_dataset`] hold out the same rows by `test_split_size` in every process, in a resumed run and under
    every seed: it draws them from NumPy's global generator, which starts differently in each process.
    """
    state = np.random.get_state()
    np.random.seed(_SPLIT_SEED)
    try:
        yield
    finally:
        np.random.set_state(state)


def load_datasets(script_args: Any, dataset_args: Any) -> Any:
    """The data that a recipe names: the mixture `datasets`, or `dataset_name`; `"playground"` is made on the spot."""
    from datasets import load_dataset
    from trl import get_dataset

    if dataset_args.datasets:
        if script_args.dataset_name:
            logger.warning(f"`datasets` is given, so `dataset_name: {script_args.dataset_name}` is not used.")
        with one_split():
            return get_dataset(dataset_args)
    if script_args.dataset_name == PLAYGROUND:
        from ...playground import load_playground_dataset

        return load_playground_dataset()
    return load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )


def split_of(dataset: Any, field: str, script_args: Any) -> Any:
    """
    The split that a field of the arguments names.

    Args:
        dataset (`~datasets.DatasetDict`):
            Splits by name.
        field (`str`):
            `"dataset_train_split"` or `"dataset_test_split"`.
        script_args (`~trl.ScriptArguments`):
            Arguments with that field.

    Raises:
        RecipeError: If the dataset has no such split.
    """
    split = getattr(script_args, field)
    if split not in dataset:
        remedy = f"Set `{field}` to one of them"
        if field == "dataset_test_split":
            remedy += ', or `test_split_size` to split `datasets`, or `eval_strategy: "no"`'
        raise RecipeError(f"`{field}: {split}` is not among the dataset's splits {sorted(dataset)}. {remedy}.")
    return dataset[split]


def ignore_boolean_buffers(model: Any) -> None:
    """Keeps DDP from synchronising boolean buffers, for models whose attention masks are such buffers."""
    model._ddp_params_and_buffers_to_ignore = [
        name for name, buffer in model.named_buffers() if buffer.dtype == torch.bool
    ]


def last_checkpoint(training_args: Any) -> str | bool | None:
    """
    What to resume from, as `Trainer.train` takes it: `resume_from_checkpoint` as a path, or `True` for the newest
    whole checkpoint of the output folder; `None` where that has no checkpoint yet.

    Raises:
        RecipeError: If it names no folder.
    """
    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        return True if checkpoints(training_args.output_dir) else None
    if not Path(wanted).is_dir():
        raise RecipeError(
            f"`resume_from_checkpoint: {wanted}` is not a folder. Give a `checkpoint-<step>` folder, or `true` for "
            "the last one of `output_dir`."
        )
    return str(wanted)


def train_and_save(trainer: Any, checkpoint: str | bool | None, what: str, dataset_name: str | None) -> None:
    """Trains from a checkpoint or anew, saves `what`, says where, and pushes it where the arguments ask for that."""
    args = trainer.args
    trainer.dataset_names = [dataset_name]  # for the card
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    trainer.save_state()  # keeps the log where no checkpoint does
    trainer.accelerator.print(saved_text(what, args.output_dir))
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    end_processes(trainer)


def saved_text(what: str, folder: str | Path) -> str:
    """Where a run has left its model, and what else lies there to be looked at."""
    return "\n".join(filter(None, [f"{what} saved to {folder}.", left_behind(folder)]))


def left_behind(folder: str | Path) -> str:
    """What a run has left in its folder to be looked at, a line for each."""
    found = [(name, Path(folder) / file) for name, file in _LEFT_BEHIND.items() if (Path(folder) / file).exists()]
    return "\n".join(f"  {name:<12} {path}" for name, path in found)
