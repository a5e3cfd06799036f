"""Files of a checkpoint beside weights and optimizer: the critic, adapting state and the open rollout; and resume."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from datasets import IterableDataset
from torch import nn
from transformers import AutoConfig, AutoModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import cached_file
from trl import GRPOTrainer

from .._upstream import open_rollout, restore_rollout
from ..core.agreement import first_fault
from ..core.checkpoint_settings import without_places
from ..core.checkpointing import WholeCheckpointsMixin
from ..core.companion import read_companion
from ..core.dropout import stated_probabilities
from ..equilibrium.value_heads import EPValueHeads, without_subspaces
from .adaptation import RolloutController
from .critic import CRITIC_FILE, SeparateCritic, ValueHeads
from .ensemble import EnsembleMonitor
from .prompts import stream_position
from .scores import ScoreScaling


MULTIPLIERS_FILE = "multipliers.json"
STATE_FILE = "ppo_state.json"
STOP_FILE = "stop_reason.json"
ROLLOUT_FILE = "rollout_{rank}.pt"
# What of a constraint may be otherwise in a resumed run, and settings that an open rollout cannot be gone on with
THRESHOLD_FIELDS = ("threshold", "quantile", "relative_gain", "tolerance", "spread")
_SHAPES_OF_ROLLOUT = (
    "per_device_train_batch_size", "steps_per_generation", "num_iterations", "num_generations",
    "gradient_accumulation_steps", "multiplier_update", "cliprange_value_unit",
)  # fmt: skip
logger = get_logger(__name__)
# A float that counts epochs, a sum of many steps, may stand this much below the whole number that it means
_EPOCH_ROUNDING = 1e-6


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
    heads = EPValueHeads.from_saved(json.loads(metadata["heads"])) if "heads" in metadata else None
    state = without_subspaces(state)
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


class CheckpointMixin(WholeCheckpointsMixin, GRPOTrainer):
    """What [`ConstrainedPPOTrainer`], whose base this is, saves and takes up again."""

    _fixed_settings = (
        "optim", "method", "objective", "mixing", "whitening", "critic", "critic_head", "critic_hidden_features",
        "critic_feedback", "use_score_scaling", "sat_target", "multiplier_squash", "multiplier_units", "rewards",
        "constraints",
    )  # fmt: skip
    controller: RolloutController
    ensembles: EnsembleMonitor
    scores: ScoreScaling | None
    search_callback: Any
    has_companion: Any
    resumed: bool
    stop_reason: str | None
    _dropped: list

    def _more_settings(self) -> dict[str, Any]:
        own = self.controller.stated_constraints()
        thresholds = {key: {name: one[name] for name in THRESHOLD_FIELDS} for key, one in own.items()}
        others = {key: {name: one[name] for name in one if name not in THRESHOLD_FIELDS} for key, one in own.items()}
        return {
            "rewards": self.controller.reward_names,
            "constraints": others,
            **{f"threshold of {key}": fields for key, fields in thresholds.items()},
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        step, batches = open_rollout(self)
        own = {"ensembles": self.ensembles.state_dict()}
        with self._failing_later():
            if self.args.should_save:
                if self.scores is not None:
                    own["scores"] = self.scores.state_dict()
                write_json(folder, STATE_FILE, {**self.controller.state_dict(), **own, "step": step})
                if self.controller.multipliers is not None:
                    write_json(folder, MULTIPLIERS_FILE, self.controller.multipliers.state_dict())
                if self.search_callback is not None:
                    self.search_callback.save(folder)
            if _internal_call and batches is not None:
                save_rollout(folder, self.accelerator.process_index, batches)
        with stated_probabilities(self._dropped):
            super().save_model(output_dir, _internal_call=_internal_call)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, checkpoint, trial)
        if checkpoint is None or self.args.ignore_data_skip or not isinstance(self.train_dataset, IterableDataset):
            return position
        saved = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        return stream_position(saved, self.args.gradient_accumulation_steps)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.has_companion and (Path(resume_from_checkpoint) / CRITIC_FILE).is_file():
            raise ValueError(
                f"The checkpoint {resume_from_checkpoint} has a critic and this run has `critic='none'`. Resume with "
                "the `critic` of the saved run, or train from its weights without `resume_from_checkpoint`."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        # Kept for a resumed run, which draws the orders of the epochs before it
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        remedy = "Resume from a checkpoint of a run with the same `method` and constraints."
        state = read_json(checkpoint, STATE_FILE, remedy)
        if self.controller.multipliers is not None:
            self.controller.multipliers.load_state_dict(read_json(checkpoint, MULTIPLIERS_FILE, remedy))
        self.controller.load_state_dict(state)
        if self.scores is not None:
            self.scores.load_state_dict(state.get("scores", {}))
        self.ensembles.load_state_dict(state.get("ensembles", {}))
        if self.search_callback is not None:
            self.search_callback.load(checkpoint)
        self._apply_changes()
        # Each epoch draws its own order, which a new sampler would begin anew
        if not isinstance(self.train_dataset, IterableDataset):
            for _ in range(int(float(self.state.epoch or 0.0) + _EPOCH_ROUNDING)):
                next(iter(self._train_sampler), None)
        self._restore_rollout(checkpoint, state["step"])
        self.resumed = True

    def _apply_changes(self) -> None:
        """The recipe's coefficient and thresholds, where they are not those that the checkpoint's run began with."""
        if "kl_coef" in self._changes:
            self.controller.kl_coef = self.args.kl_coef
        changed = [key for key in self.controller.keys if without_places(f"threshold of {key}") in self._changes]
        self.controller.restate_thresholds(changed)

    def _restore_rollout(self, checkpoint: str, step: int) -> None:
        """The open rollout, or none on all processes alike: one that generates would wait for the others for ever."""
        generate_every = self.args.steps_per_generation * self.num_iterations
        batches, fault = None, None
        others = [name for name in _SHAPES_OF_ROLLOUT if name in self._changes]
        was_open = any(Path(checkpoint).glob(ROLLOUT_FILE.format(rank="*")))
        if was_open and self._other_world:
            fault = "another number of processes made it"
        elif was_open and others:
            fault = f"it was made with another `{others[0]}`"
        elif step % generate_every:
            batches = load_rollout(checkpoint, self.accelerator.process_index, self.accelerator.device)
            if batches is None:
                fault = f"{ROLLOUT_FILE.format(rank=self.accelerator.process_index)} is missing"
        fault = first_fault(fault)
        if fault is not None:
            logger.warning(
                f"The open rollout of {Path(checkpoint).name} is left out, and the next step generates anew: {fault}.",
                main_process_only=True,
            )
            batches, step = None, 0
        restore_rollout(self, step, batches)
