"""The trainers' side of checkpoints that are whole or not there, in four moments of a run:

    train                           one run for a folder; the newest whole checkpoint, on which all processes agree
    _load_optimizer_and_scheduler   the recipe's learning rates and steps in place of the checkpoint's
    _run_epoch                      a run that had ended stays ended
    _save_checkpoint                written aside by all processes, published by one, or removed where the disk is full

A folder is published by the main process, or by one process of each machine where they share no disk, while training
goes on: flushing and hashing need neither the interpreter nor the device. It is waited for at the next save, at the
end of an epoch, and at once where a callback of the trainer acts on saves.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .._upstream import cpu_without_number
from .._version import __version__
from .agreement import first_fault, from_main, on_each_node, wait_for_all
from .checkpoint import (
    MANIFEST_FILE,
    RECUT,
    SAVING,
    checkpoints,
    fault_of,
    prune,
    publish,
    read_manifest,
    step_of,
    unsafe_files,
)
from .checkpoint_settings import (
    OPTIMIZER_OPTIONS,
    Settings,
    compare_settings,
    stated_changes,
    stated_settings,
    without_places,
)
from .files import is_lack_of_space, warn_of_failure
from .peers import naming_lost_peers
from .run_arguments import RunArguments
from .run_folder import RunLock, prepare_folder
from .safe_text import known_secrets
from .signals import RequeueCallback
from .status import RunError
from .zero_recut import num_pieces, recut_checkpoint


logger = get_logger(__name__)
# Options of a parameter group that a configuration states, and that a checkpoint of the optimizer would bring back
_GROUP_OPTIONS = (
    "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "amsgrad", "alpha", "delta", "wd_ratio",
    "project_momentum", "projection",
)  # fmt: skip
# A checkpoint may be this much smaller than the one before it, which held an open rollout
_SURELY_NEEDED = 0.9
_LACK = "the disk is full"
_MEGABYTE = 2**20


class WholeCheckpointsMixin(Trainer):
    """
    Base of a trainer, before TRL's: its checkpoints are whole or not there, are checked before a run goes on from
    them, and are those of one run. Settings that a checkpoint was written with are compared with the run's own.

    Attributes:
        run_arguments ([`RunArguments`]): Settings of the run, where the trainer's configuration does not have them.
        stop_reason (`str` or `None`): Why training ended before its last step; the manifest holds it.
    """

    run_arguments = RunArguments()
    stop_reason: str | None = None
    # Settings that a resumed run must have as its checkpoint; those of a subclass come with its parents'
    _fixed_settings: tuple[str, ...] = ("optim",)
    _changes: dict[str, tuple] = {}
    _ended: str | None = None
    _own_options: list[dict[str, Any]] | None = None
    _resumed_from: Path | None = None
    _other_world = False  # whether another number of processes wrote the checkpoint resumed from
    _trained_before = False
    _owns_folder = False
    # Of a save under way: the folder in the place of the output folder, what has failed, and what the Hub waits for
    _partial: Path | None = None
    _failure: Exception | None = None
    _to_push: str | None = None
    # The checkpoint that is being made, with the best one before it, and the thread that makes it
    _published: tuple[Path, str | None] | None = None
    _publishing: Future | None = None
    _last_size = 0

    # What a subclass may say

    def _more_settings(self) -> Settings:
        """Settings that are no fields of the configuration, or stand in the place of one; `None` leaves it out."""
        return {}

    # One run for a folder

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._resumed_from, self._changes, self._ended, self._other_world = None, {}, None, False
        if kwargs.get("trial") is not None or args:  # a search for hyperparameters has folders of its own
            return super().train(resume_from_checkpoint, *args, **kwargs)
        with ExitStack() as stack:
            stack.enter_context(self._folder_locked())
            stack.callback(self._wait_for_publishing)
            stack.callback(self._remove_recut)
            stack.enter_context(naming_lost_peers(self.args.ddp_timeout))
            checkpoint = self._prepare_resume(resume_from_checkpoint)
            if self._run_settings.save_on_signal:
                callback = RequeueCallback(self.accelerator)
                self.add_callback(callback)
                stack.callback(self.remove_callback, callback)
                stack.enter_context(callback.listening())
            return super().train(checkpoint, **kwargs)

    def _wait_for_publishing(self) -> None:
        """At the end of a run, however it came: the folder is not given free while a checkpoint is being made."""
        if self._publishing is not None:
            self._publishing.exception()
        self._publishing = self._published = None

    @property
    def _run_settings(self) -> RunArguments:
        return self.args if isinstance(self.args, RunArguments) else self.run_arguments

    @contextmanager
    def _folder_locked(self) -> Iterator[None]:
        lock = RunLock(Path(self.args.output_dir))
        from_main(lock.acquire)
        # A machine that does not see the main process's lock has a disk of its own
        self._owns_folder = self.is_world_process_zero() or (self.is_local_process_zero() and not lock.path.exists())
        try:
            fault = on_each_node(lambda: _not_writable(Path(self.args.output_dir)))
            if fault is not None:
                raise RunError(f"`output_dir` {fault}. Choose one that every process can write to.")
            yield
        finally:
            if self.is_world_process_zero():
                lock.release()

    def _prepare_resume(self, wanted: str | bool | None) -> str | None:
        folder = Path(self.args.output_dir)
        passed_over: list[Path] = []
        checkpoint: Path | None = None
        if wanted is True:
            checkpoint, passed_over = self._newest_whole(folder)
        elif wanted:
            checkpoint = Path(str(wanted))
            self._refuse_damaged(checkpoint)
            later = [path for path in checkpoints(checkpoint.parent) if step_of(path) > step_of(checkpoint)]
            passed_over = from_main(lambda: [path for path in later if fault_of(path) is not None])
        if checkpoint is not None:
            self._compare(checkpoint)
        overwrite = self._run_settings.overwrite
        if checkpoint is not None or not self._trained_before:
            from_main(lambda: prepare_folder(folder, checkpoint, overwrite, passed_over))
        self._trained_before = True
        self._resumed_from = checkpoint
        if checkpoint is not None and self._other_world and self.is_deepspeed_enabled:
            checkpoint = self._recut(checkpoint)
        return None if checkpoint is None else str(checkpoint)

    def _newest_whole(self, folder: Path) -> tuple[Path | None, list[Path]]:
        """The newest whole checkpoint of a folder, and the damaged ones after it."""
        found = from_main(lambda: [str(path) for path in checkpoints(folder)])
        faults: dict[Path, str] = {}
        for checkpoint in map(Path, reversed(found)):
            fault = self._fault(checkpoint)
            if fault is None:
                for path, why in faults.items():
                    logger.warning(f"{path.name} is passed over: {why}.", main_process_only=True)
                if faults:
                    logger.warning(f"The run goes on from {checkpoint.name}.", main_process_only=True)
                return checkpoint, list(faults)
            faults[checkpoint] = fault
        if faults:
            stated = "; ".join(f"{path.name}: {why}" for path, why in faults.items())
            raise RunError(
                f"No checkpoint of {folder} is whole: {stated}. Start anew with another `output_dir`, or with "
                "`overwrite: true` and without `resume_from_checkpoint`."
            )
        raise RunError(f"`output_dir` {folder} has no checkpoint. Train without `resume_from_checkpoint`.")

    def _fault(self, checkpoint: Path) -> str | None:
        return on_each_node(lambda: fault_of(checkpoint) if checkpoint.is_dir() else "it is not there")

    def _refuse_damaged(self, checkpoint: Path) -> None:
        fault = self._fault(checkpoint)
        if fault is None:
            return
        others = [path for path in checkpoints(checkpoint.parent) if path.name != checkpoint.name]
        good = from_main(lambda: next((str(path) for path in reversed(others) if fault_of(path) is None), None))
        last = f"The last whole one is {good}." if good else "No other checkpoint beside it is whole."
        raise RunError(f"The checkpoint {checkpoint} is damaged: {fault}. {last}")

    def _compare(self, checkpoint: Path) -> None:
        """Refuses a checkpoint that this run cannot go on from, and says what has changed since."""
        fault = on_each_node(lambda: _unsafe(checkpoint))
        if fault is not None:
            raise RunError(f"The checkpoint {checkpoint} is not read: {fault}.")
        manifest = read_manifest(checkpoint)
        if manifest is None:
            missing = [name for name in ("optimizer.pt", "scheduler.pt") if not (checkpoint / name).is_file()]
            fresh = f" It has no {' and no '.join(missing)}, so that what these hold begins anew." if missing else ""
            fresh = "" if self.is_deepspeed_enabled or self.is_fsdp_enabled else fresh
            logger.warning(
                f"{checkpoint} has no {MANIFEST_FILE}, so its files and settings could not be compared.{fresh}",
                main_process_only=True,
            )
            self._compare_world(num_pieces(checkpoint) or self.args.world_size, checkpoint)
            return
        settings = without_places(manifest["settings"])  # those of earlier versions have paths
        saved = {"trainer": manifest["trainer"], "engine": manifest["engine"], **settings}
        own = {"trainer": self._trainer_name(), "engine": self._engine(), **self._settings()}
        self._changes = compare_settings(saved, own, {"trainer", "engine", *self._fixed_settings}, checkpoint.name)
        self._compare_world(manifest["world_size"], checkpoint)
        if self._changes:
            logger.warning(
                f"Settings that differ from those of {checkpoint.name}, and hold from here on: "
                f"{stated_changes(self._changes)}.",
                main_process_only=True,
            )
        elif manifest["ended"] is not None:
            self._ended = manifest["ended"]

    def _compare_world(self, before: int, checkpoint: Path) -> None:
        now = self.args.world_size
        self._other_world = before != now
        if before == now:
            return
        logger.warning(
            f"{checkpoint.name} was written by {before} processes and this run has {now}: weights, optimizer and all "
            "other states go on, while the order of the rows and the random numbers are not those of a run that was "
            "not interrupted.",
            main_process_only=True,
        )

    def _recut(self, checkpoint: Path) -> Path:
        """A folder with the checkpoint as DeepSpeed would have cut it for this run's number of processes."""
        folder, fault = Path(self.args.output_dir) / RECUT / checkpoint.name, None
        if self._owns_folder:
            try:
                recut_checkpoint(checkpoint, folder, self.args.world_size)
            except Exception as error:  # whatever it is, the other processes wait to hear of it
                shutil.rmtree(folder, ignore_errors=True)
                fault = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        fault = first_fault(fault)
        if fault is not None:
            raise RunError(
                f"The checkpoint {checkpoint} was written by another number of processes under DeepSpeed, and could "
                f"not be cut for {self.args.world_size}: {fault}. Resume with as many as wrote it, or train from its "
                "weights without `resume_from_checkpoint`."
            )
        return folder

    def _remove_recut(self, parts: str = RECUT) -> None:
        """What [`_recut`] has made: all of it, or DeepSpeed's files, once they are read."""
        if self._owns_folder:
            for path in Path(self.args.output_dir).glob(parts):
                shutil.rmtree(path, ignore_errors=True)

    # Settings

    def _trainer_name(self) -> str:
        """The class of TRL or of this package whose training this is."""
        named = next(one for one in type(self).__mro__ if one.__module__.startswith(("trl", "transformers")))
        return named.__name__

    def _engine(self) -> str:
        if self.is_deepspeed_enabled:
            return f"ZeRO-{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return "FSDP" if self.is_fsdp_enabled else "plain"

    def _settings(self) -> Settings:
        return stated_settings(self.args, self._more_settings())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        # As the configuration has them, before a checkpoint is loaded over them
        self._own_options = [
            {name: group[name] for name in ("lr", *_GROUP_OPTIONS) if name in group}
            for group in optimizer.param_groups
        ]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        own = self._own_options if checkpoint and self._changes.keys() & set(OPTIMIZER_OPTIONS) else None
        with warnings.catch_warnings():
            if own is not None:  # they are set below, so that an optimizer's word on them would be wrong
                warnings.filterwarnings("ignore", message=".*, resumed: ")
            with cpu_without_number(self.args):
                super()._load_optimizer_and_scheduler(checkpoint)
        if own is not None:
            _set_options(self.optimizer, self.lr_scheduler, own)
        if checkpoint is not None and Path(checkpoint).parent.name == RECUT:
            wait_for_all()
            self._remove_recut(f"{RECUT}/*/global_step*")

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, checkpoint, trial)
        if checkpoint is not None:
            self.state.compute_steps(self.args, max_steps)  # the recipe's intervals, not the checkpoint's
        return position

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._resumed_from is not None and (self._ended or self.state.global_step >= self.state.max_steps):
            reason = self._ended or f"it has made its {self.state.max_steps} steps"
            logger.warning(f"The run had ended at step {self.state.global_step}: {reason}", main_process_only=True)
            self.stop_reason = self._ended
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
        self._finish_publishing()

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if trial is not None or not self._trained_before:
            super()._save_checkpoint(model, trial)
            return
        folder, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial, final = folder / SAVING / name, folder / name
        best = self.state.best_model_checkpoint
        self._finish_publishing()
        self._failure = None
        fault = on_each_node(lambda: self._too_little_space(folder))
        if fault is None:
            if self._owns_folder:
                shutil.rmtree(folder / SAVING, ignore_errors=True)
            wait_for_all()
            self._partial, self._to_push = folder / SAVING, None
            with self._failing_later():
                super()._save_checkpoint(model, trial)
            with self._failing_later():
                self._state_best(partial, best)
            fault = self._agreed_fault()
        self._partial = None
        if fault is not None:
            self.state.best_model_checkpoint = best
            self._give_up(folder / SAVING, fault, self.state.global_step)
            return
        self._published = (final, best)
        if self._owns_folder:
            pool = ThreadPoolExecutor(1)
            kept = self.state.best_model_checkpoint
            self._publishing = pool.submit(self._publish, partial, final, self._about(), kept)
            pool.shutdown(wait=False)
        acted_on = self._to_push or any(_acts_on_saves(one) for one in self.callback_handler.callbacks)
        if first_fault("waits" if acted_on else None) is not None:
            self._finish_publishing()

    def _about(self) -> dict[str, Any]:
        """What a manifest says beside the files."""
        return {
            "trainer": self._trainer_name(),
            "versions": {"trl_ext": __version__, "torch": torch.__version__},
            "engine": self._engine(),
            "world_size": self.args.world_size,
            "step": self.state.global_step,
            "ended": without_places(self.stop_reason, known_secrets(self.args.hub_token)),
            "settings": self._settings(),
        }

    def _publish(self, partial: Path, final: Path, about: dict[str, Any], best: str | None) -> int:
        """Makes the checkpoint, and deletes those that it takes the place of; gives its size in bytes."""
        manifest = publish(partial, final, about)
        prune(final.parent, self.args.save_total_limit, final, best)
        return sum(entry["size"] for entry in manifest["files"].values())

    def _finish_publishing(self) -> None:
        """Waits for the checkpoint that is being made, if there is one; all processes must call it."""
        if self._published is None:
            return
        (final, best), self._published = self._published, None
        self._failure = None
        if self._publishing is not None:
            future, self._publishing = self._publishing, None
            failure = future.exception()
            if isinstance(failure, Exception):
                self._failure = failure
            else:
                self._last_size = future.result()
        fault = self._agreed_fault()
        if fault is not None:
            if self.state.best_model_checkpoint == str(final):
                self.state.best_model_checkpoint = best
            self._give_up(final.parent / SAVING, fault, step_of(final))
        elif self._to_push is not None:
            self._to_push = None
            self._push_from_checkpoint(str(final))

    def _load_best_model(self) -> None:
        self._finish_publishing()
        super()._load_best_model()

    def _state_best(self, partial: Path, before: str | None) -> None:
        """The best checkpoint under the name that it will have, or has, in the state too that is saved already."""
        step, best = self.state.best_global_step, before
        if step:
            named = os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
            best = named if step == self.state.global_step or os.path.isdir(named) else before
        if best != self.state.best_model_checkpoint:
            self.state.best_model_checkpoint = best
            if self.args.should_save:
                self.state.save_to_json(str(partial / TRAINER_STATE_NAME))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._partial is not None:
            self._to_push = checkpoint_folder  # once it is where it stays
            return
        super()._push_from_checkpoint(checkpoint_folder)

    # Where a part of a save fails, the other processes are not left alone in an exchange: all go through the parts,
    # and agree at the end on what was wrong

    @contextmanager
    def _failing_later(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._partial is None:
                raise
            self._failure = self._failure or error

    def _agreed_fault(self) -> str | None:
        """What has failed on any process; all processes must call it."""
        failure, partial = self._failure, Path(self.args.output_dir) / SAVING
        if failure is None:
            return first_fault(None)
        written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        missing = self._expected_size() - written - shutil.disk_usage(partial.parent).free
        # An error of the system has its number; a writer that passes it on in words of its own is judged by the disk
        lack = is_lack_of_space(failure) or (not isinstance(failure, OSError) and missing > 0)
        if not lack:
            return first_fault(f"{type(failure).__name__}: {failure}")
        return first_fault(f"{_LACK}, about {max(missing, _MEGABYTE) / _MEGABYTE:.0f} MB more are needed")

    def _expected_size(self) -> int:
        """Bytes of a checkpoint: of the one before, or at least those of the weights and the optimizer's state."""
        if self._last_size or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return self._last_size
        saved = [p for p in self.model.parameters() if p.requires_grad or not is_peft_model(self.model)]
        states = self.optimizer.state.values() if self.args.should_save else ()
        kept = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in [*saved, *kept])

    def _too_little_space(self, folder: Path) -> str | None:
        """Before anything is written: a process that fails in the middle of an exchange leaves the others waiting."""
        missing = _SURELY_NEEDED * self._expected_size() - shutil.disk_usage(folder).free
        return f"{_LACK}, about {missing / _MEGABYTE:.0f} MB more are needed" if missing > 0 else None

    def _give_up(self, partial: Path, fault: str, step: int) -> None:
        """Removes what was written; goes on where the disk is full and the settings say so."""
        if self._owns_folder:
            shutil.rmtree(partial, ignore_errors=True)
        wait_for_all()
        message = f"No checkpoint was saved at step {step}: {fault}. Earlier ones are kept."
        if _LACK not in fault:
            raise RuntimeError(message) from self._failure
        if self._run_settings.full_disk == "stop":
            raise RunError(f"{message} Make room and resume, or set `full_disk: continue` to train on.")
        logger.warning(f"{message} Training goes on until the next save; make room for it.", main_process_only=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self._partial is None:
            super().create_model_card(*args, **kwargs)
            return
        with warn_of_failure("The model card could not be written"):
            super().create_model_card(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._failing_later():
            super().save_model(output_dir, _internal_call=_internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._failing_later():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        with self._failing_later():
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with self._failing_later():
            super()._save_rng_state(output_dir)


def _acts_on_saves(callback: TrainerCallback) -> bool:
    """Whether a callback expects a checkpoint to be there when it is told of a save."""
    if isinstance(callback, RequeueCallback):
        return callback.ends
    return type(callback).on_save is not TrainerCallback.on_save


def _not_writable(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder} cannot be written to ({error.strerror})"


def _unsafe(checkpoint: Path) -> str | None:
    found = unsafe_files(checkpoint)
    stated = "; ".join(f"{name} names {', '.join(names[:3])}" for name, names in found.items())
    return f"{stated}, which no checkpoint is made of and which could run code" if found else None


def _set_options(optimizer: Any, scheduler: Any, own: list[dict[str, Any]]) -> None:
    """Gives parameter groups the options of the run's own configuration, at the place in the schedule reached."""
    lambdas = getattr(scheduler, "lr_lambdas", None)
    for index, (group, options) in enumerate(zip(optimizer.param_groups, own, strict=True)):
        rate, before = options["lr"], group.get("initial_lr", group["lr"])
        if lambdas is not None:
            reached = rate * lambdas[index](scheduler.last_epoch)
        else:
            reached = group["lr"] * rate / before if before else rate
        group.update({name: value for name, value in options.items() if name != "lr"}, lr=reached, initial_lr=rate)
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [options["lr"] for options in own]
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
