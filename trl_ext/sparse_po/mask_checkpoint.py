"""Learned masks on disk, beside the policy and never inside it."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .masked_forward import TokenMasks


TOKEN_MASKS_FILE = "token_masks.safetensors"


def _settings(masks: TokenMasks) -> dict[str, str]:
    settings = {
        "mask_type": masks.mask_type,
        "independent_masks": masks.independent,
        "mask_reward": masks.masks_reward,
        "mask_divergence": masks.masks_divergence,
    }
    return {name: str(value) for name, value in settings.items()}


def save_masks(state: dict[str, torch.Tensor], folder: str | Path, masks: TokenMasks) -> None:
    """
    Writes `token_masks.safetensors`, the mask settings in its metadata.

    Args:
        state (`dict[str, torch.Tensor]`):
            Whole tensors by name, such as `"common.layer_weight"`.
        folder (`str` or `Path`):
            Folder of the model or checkpoint; made where missing.
        masks ([`TokenMasks`]):
            The masks, for their settings.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    metadata = _settings(masks) | {"format": "pt"}
    save_file(state, Path(folder) / TOKEN_MASKS_FILE, metadata=metadata)


def load_masks(masks: TokenMasks, folder: str | Path) -> None:
    """
    Restores the masks of a checkpoint in place. Does nothing without learned masks.

    Args:
        masks ([`TokenMasks`]):
            Masks of the policy.
        folder (`str` or `Path`):
            Folder of the checkpoint.

    Raises:
        ValueError: If the file is missing, or is of masks of another kind or shape.
    """
    if not masks.learned:
        return
    path = Path(folder) / TOKEN_MASKS_FILE
    if not path.is_file():
        raise ValueError(
            f"The checkpoint {folder} has no {TOKEN_MASKS_FILE}, so its learned masks cannot be restored. Resume from "
            "a checkpoint of a SparsePO run with learned masks, or train from its weights without "
            "`resume_from_checkpoint`."
        )
    with safe_open(path, framework="pt") as file:
        saved_settings = file.metadata() or {}
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, value in _settings(masks).items():
        if saved_settings.get(name) != value:
            raise ValueError(
                f"The masks of the checkpoint {folder} were trained with `{name}={saved_settings.get(name)}`, and "
                f"this run has `{name}={value}`. Set it to the checkpoint's value, or start a new run."
            )
    own = {name: parameter.shape for name, parameter in masks.learned.named_parameters()}
    if own != {name: tensor.shape for name, tensor in saved.items()}:
        raise ValueError(
            f"The masks of the checkpoint {folder} are for a reference model of another size: "
            f"{_sizes(saved)} against {_sizes(dict(masks.learned.named_parameters()))} (layers, hidden size). Use the "
            "reference model that they were trained with."
        )
    masks.learned.load_state_dict(saved)


def restore_masks(folder: str | Path) -> TokenMasks:
    """
    Builds the masks that a finished run saved, to study them.

    Args:
        folder (`str` or `Path`):
            Folder with `token_masks.safetensors`.

    Returns:
        [`TokenMasks`]

    Raises:
        FileNotFoundError: If the file is missing.
    """
    path = Path(folder) / TOKEN_MASKS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {TOKEN_MASKS_FILE}. Give the folder of a run with learned masks.")
    with safe_open(path, framework="pt") as file:
        settings = file.metadata()
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    num_layers, hidden_size = next(tensor.shape for name, tensor in saved.items() if name.endswith("layer_weight"))
    masks = TokenMasks(
        num_layers,
        hidden_size,
        settings["mask_type"],
        settings["independent_masks"] == "True",
        settings["mask_reward"] == "True",
        settings["mask_divergence"] == "True",
    )
    masks.learned.load_state_dict(saved)
    return masks.eval()


def _sizes(tensors: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith("layer_weight")]
