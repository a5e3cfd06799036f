"""Trains the smallest model in several processes, with faults in one of them; started by the tests."""

import argparse
import errno
import json
import logging
import os
import signal
import time
from pathlib import Path

import torch
from accelerate.utils import gather_object

from tests.helpers.launched import finish
from tests.helpers.line import DATA, make


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--output", required=True)
    parser.add_argument("--resume")
    parser.add_argument("--full_disk_of_rank", type=int)
    parser.add_argument("--killed_rank", type=int, help="which is killed while it saves step 3")
    parser.add_argument("--silent_rank", type=int, help="which sleeps for a minute there")
    parser.add_argument("--rows", type=int, default=len(DATA))
    parser.add_argument("--settings", default="{}")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    trainer = make(options.output, **json.loads(options.settings))
    trainer.train_dataset = DATA[: options.rows]
    rank, save = trainer.accelerator.process_index, torch.save

    def refusing(state, path, *args, **kwargs):
        if rank == options.full_disk_of_rank and trainer.state.global_step == 2 and "rng_state" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        if rank == options.silent_rank and trainer.state.global_step == 3:
            time.sleep(60)
        if rank == options.killed_rank and trainer.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, path, *args, **kwargs)

    torch.save = refusing
    error = None
    try:
        trainer.train(resume_from_checkpoint={"true": True}.get(options.resume, options.resume))
    except ValueError as found:
        if (options.killed_rank, options.silent_rank) != (None, None):  # nothing can be gathered any more
            raise
        error = str(found)
    weights = trainer.accelerator.unwrap_model(trainer.model).line.weight.flatten().tolist()
    found = {
        "errors": gather_object([error]), "weights": gather_object([weights]), "step": trainer.state.global_step,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }  # fmt: skip
    Path(options.output).mkdir(parents=True, exist_ok=True)
    trainer.model_wrapped = trainer.model_wrapped or trainer.model
    finish(trainer, options.output, found)


if __name__ == "__main__":
    main()
