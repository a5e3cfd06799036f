"""
Runs scripts in processes that are forked from one that has imported the libraries, which takes longer than what most
scripts do.

The processes get the environment that a launcher would give them, and see what a script started by one sees; but their
hashes of strings are the same, and they never import anew. The real commands are run by tests of their own.
"""

import faulthandler
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path


ROOT = Path(__file__).parents[2]
MODULES = (
    "torch.distributed.fsdp", "deepspeed", "deepspeed.comm.torch", "datasets", "peft", "trl.trainer.dpo_trainer",
    "trl.trainer.grpo_trainer", "trl.trainer.sft_trainer", "trl.trainer.reward_trainer",
    "trl_ext.sparse_po.sparse_po_trainer", "trl_ext.constrained_ppo.constrained_ppo_trainer",
    "trl_ext.equilibrium.training",
)  # fmt: skip
# What the processes that are left may take once one of them has failed
PATIENCE = 10.0


class ForkServer:
    """The process that has imported the libraries, and what it is asked."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fork_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment, cwd=ROOT,
        )  # fmt: skip

    def run(self, argv, environments, folder, timeout=900):
        """
        Runs the script `argv[0]` with the arguments after it, one process for each of `environments`. Returns the exit
        status of the first that failed, or 0, and all that they printed on both streams.
        """
        job = {"argv": argv, "environments": environments, "folder": str(folder), "timeout": timeout}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "The process that forks has ended."
        printed = ["", ""]
        for rank in range(len(environments)):
            for index, stream in enumerate(("stdout", "stderr")):
                printed[index] += (Path(folder) / f"{stream}_{rank}.log").read_text(errors="replace")
        return json.loads(answer), *printed


def become(argv, environment, folder, rank):
    """In the forked process: takes on its environment and streams, and runs the script."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(folder) / f"{name}_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    faulthandler.enable(all_threads=False)  # where a signal ends it
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    status = 1
    try:
        runpy.run_path(argv[0], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_job(job):
    """Exit status of the first process that failed, or 0."""
    pids = []
    for rank, environment in enumerate(job["environments"]):
        pid = os.fork()
        if pid == 0:
            become(job["argv"], environment, job["folder"], rank)
        pids.append(pid)
    failure, end = 0, time.monotonic() + job["timeout"]
    while pids:
        pid, status = os.waitpid(pids[0], os.WNOHANG)
        if pid:
            pids.remove(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and not failure:
                failure, end = code, min(end, time.monotonic() + PATIENCE)
            continue
        pids.append(pids.pop(0))
        if time.monotonic() > end:
            for left in pids:
                os.kill(left, signal.SIGKILL)
            end, failure = float("inf"), failure or -signal.SIGKILL
        time.sleep(0.01)
    return failure


def main():
    answers = os.fdopen(os.dup(1), "w")
    # Nothing but answers goes there
    os.dup2(2, 1)
    for name in MODULES:
        importlib.import_module(name)
    # A collection in a forked process is spared the libraries' objects, whose pages it would copy by walking over them
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        answers.write(json.dumps(run_job(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
