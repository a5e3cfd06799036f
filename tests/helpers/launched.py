"""What the scripts share that tests launch in several processes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed.comm.torch  # noqa: F401


# Spares a compilation of 30 to 100 seconds; gloo carries the collectives instead
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def wrapper_chain(trainer) -> list[str]:
    """Classes of the wrapped model and of the optimizer's wrappers, outermost first."""
    chain = [type(trainer.model_wrapped).__name__]
    optimizer = trainer.optimizer
    while optimizer is not None:
        chain.append(type(optimizer).__name__)
        optimizer = getattr(optimizer, "optimizer", None)
    return chain


def finish(trainer, folder: Path | str, found: dict[str, Any]) -> None:
    """Writes what a test reads, with how the trainer ran, to `found.json`, and ends the process."""
    if trainer.is_world_process_zero():
        zero_stage = trainer.model_wrapped.zero_optimization_stage() if trainer.is_deepspeed_enabled else None
        found = {
            "world_size": trainer.args.world_size, "chain": wrapper_chain(trainer), "zero_stage": zero_stage, **found,
        }  # fmt: skip
        (Path(folder) / "found.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    # Everything is written; taking the trainer down can wait for ever for a gloo peer that is already gone
    sys.stdout.flush()
    os._exit(0)
