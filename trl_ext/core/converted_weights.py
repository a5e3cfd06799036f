"""Checkpoints whose tensors are not named as the model's: transformers saves fused experts one by one, and its trainer
does not put them together again where it resumes."""

import json
from pathlib import Path

from accelerate.logging import get_logger
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


logger = get_logger(__name__)


def restore_converted_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """
    Loads a checkpoint by `from_pretrained`, which knows how saved tensors become a model's, where tensors in it have
    other names than the model's. Does nothing where all names agree, and for an adapter's checkpoint.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model, changed in place; neither sharded nor quantized.
        folder (`str` or `Path`):
            Checkpoint of this model.

    Raises:
        ValueError: If parameters of the model are still missing.
    """
    if not _saved_names(Path(folder)) - model.state_dict().keys():
        return
    loaded, info = type(model).from_pretrained(
        folder, config=model.config, dtype=model.dtype, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(
            f"The checkpoint {folder} lacks {', '.join(sorted(info['missing_keys'])[:3])} of {type(model).__name__}, "
            "so training cannot go on from it. Resume from a checkpoint that the same version of transformers wrote."
        )
    model.load_state_dict(loaded.state_dict(), strict=False)
    logger.info(f"Tensors of {folder} were saved under other names than {type(model).__name__}'s, and are converted.")


def _saved_names(folder: Path) -> set[str]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        return set()
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return set(file.keys())
