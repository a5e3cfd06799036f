"""What every command and every configuration of ours may say of the run itself: its folder, full disks and signals."""

from dataclasses import dataclass, field
from typing import Literal

from .checks import check_choice


@dataclass
class RunArguments:
    """
    Settings of a run beside its training.

    Args:
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether checkpoints of another run in `output_dir`, or of steps after the one resumed from, are deleted.
            Otherwise a run that finds some is refused.
        full_disk (`str`, *optional*, defaults to `"continue"`):
            Where the disk is full while a checkpoint is saved: `"continue"` keeps the earlier ones and trains on until
            the next save, `"stop"` ends the run with an error.
        save_on_signal (`bool`, *optional*, defaults to `False`):
            Whether SIGTERM and SIGUSR1 save a checkpoint after the step under way and end the process with status 75,
            for schedulers that start it again.
    """

    overwrite: bool = field(
        default=False, metadata={"help": "Delete the checkpoints of another run in `output_dir`, or of later steps."}
    )
    full_disk: Literal["continue", "stop"] = field(
        default="continue", metadata={"help": "Where the disk is full while a checkpoint is saved: continue or stop."}
    )
    save_on_signal: bool = field(
        default=False, metadata={"help": "On SIGTERM and SIGUSR1 save a checkpoint and end with status 75."}
    )

    def __post_init__(self) -> None:
        check_choice(self, "full_disk", choices=("continue", "stop"))
        check_choice(self, "overwrite", "save_on_signal", choices=(True, False))
        # A configuration that inherits these fields beside a parent's has checks of its own behind them
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()
