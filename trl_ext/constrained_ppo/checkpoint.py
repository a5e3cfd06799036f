"""Files of a checkpoint beside weights and optimizer: the critic, adapting state and the open rollout."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import cached_file

from ..core.companion import read_companion
from ..equilibrium.value_heads import EPValueHeads
from .critic import CRITIC_FILE, SeparateCritic, ValueHeads


MULTIPLIERS_FILE = "multipliers.json"
STATE_FILE = "ppo_state.json"
STOP_FILE = "stop_reason.json"
ROLLOUT_FILE = "rollout_{rank}.pt"


def critic_from_pretrained(name_or_path: str) -> nn.Module:
    """
    The critic that a [`ConstrainedPPOTrainer`] saved beside a policy.

    Args:
        name_or_path (`str`):
            Folder or Hub id of the policy.

    Returns:
        [`ValueHeads`] or [`EPValueHeads`], to be called with the policy's last hidden states, or [`SeparateCritic`],
        to be called with token ids and their attention mask. In evaluation mode, float32.

    Raises:
        ValueError: If the critic is a module of the user's own: build it and load `critic.safetensors` into it. Also
            if the file does not hold exactly the critic's tensors.
    """
    path = str(cached_file(name_or_path, CRITIC_FILE))
    state, metadata = read_companion(path)
    critic: nn.Module
    heads = EPValueHeads(**json.loads(metadata["heads"])) if "heads" in metadata else None
    if "backbone" in metadata:
        config = json.loads(metadata["backbone"])
        backbone = AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
        num_heads = len(json.loads(metadata["rewards"])) + 1
        critic = SeparateCritic(backbone.float(), num_heads, heads)
    elif heads is not None:
        critic = heads
    elif state.keys() == {"weight", "bias"}:
        critic = ValueHeads(state["weight"].size(1), state["weight"].size(0))
    else:
        raise ValueError(
            f"{path} holds a module of the author's own, with {sorted(state)[:3]}. Build that module and call "
            "`load_state_dict` with the file's content."
        )
    expected, found = critic.state_dict().keys(), state.keys()
    if expected != found:
        raise ValueError(
            f"{path} does not fit the critic that its metadata describe: it lacks {sorted(expected - found)[:3]} and "
            f"has {sorted(found - expected)[:3]} too many. Build the critic yourself and load the tensors by name."
        )
    critic.load_state_dict(state)
    return critic.eval()


def write_json(folder: Path, name: str, content: Any) -> None:
    """Writes a file of a checkpoint in one piece, so that an interrupted save leaves the earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial"
    partial.write_text(json.dumps(content))
    partial.replace(folder / name)


def read_json(folder: str | Path, name: str, remedy: str) -> Any:
    """Reads a file of a checkpoint; refuses one that is missing, with the remedy given, or no JSON."""
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"The checkpoint {folder} has no {name}. {remedy}")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): an interrupted save. Resume from another one."
        ) from error


def save_rollout(folder: Path, rank: int, batches: list[dict[str, Any]]) -> None:
    """Writes a rollout on which updates are still to come, one file for each process."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(send_to_device(batches, "cpu"), folder / ROLLOUT_FILE.format(rank=rank))


def load_rollout(folder: str | Path, rank: int, device: torch.device) -> list[dict[str, Any]] | None:
    """What [`save_rollout`] wrote, on `device`; `None` where the checkpoint was written between two rollouts."""
    path = Path(folder) / ROLLOUT_FILE.format(rank=rank)
    if not path.is_file():
        return None
    return send_to_device(torch.load(path, map_location="cpu", weights_only=True), device)
