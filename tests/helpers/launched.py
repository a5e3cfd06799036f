"""What the scripts share that tests launch in several processes."""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import fully_shard

from tests.helpers import deepspeed_on_cpu  # noqa: F401


def shard_fully(trainer) -> None:
    """
    Before training: each layer of the policy, and the policy, under torch's `fully_shard` over all processes, where
    accelerate would wrap it in DDP. accelerate does the same under FSDP2, which it turns on for GPUs only.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
    if model.can_generate():  # Whoever has ended its responses goes on with those that have not, as under accelerate
        model.generate = functools.partial(model.generate, synced_gpus=True)
    trainer.accelerator.prepare_model = lambda model, *args, **kwargs: model


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
    trainer.accelerator.end_training()
    # Everything is written; taking the trainer down can wait for ever for a gloo peer that is already gone
    sys.stdout.flush()
    os._exit(0)
