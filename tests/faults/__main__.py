"""
Puts the commands under faults and prints what came of it: `make faults`, or `python -m tests.faults --chains 1`.

Each fault ends in one of: the same weights, states and losses bit for bit as without it; refused with a message that
names the file, the setting or the other run; applied, for a setting that may change, and listed. Everything else is a
failure: another result, a traceback, a message that does not say what is wrong, a process that is stuck. With
`--ledger FILE` what was tried stands in a file, and a harness that was ended goes on from there.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.ledger import Ledger


KINDS = ("kill", "damage", "hand", "disk", "settings", "two")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--commands", nargs="+", help="commands under fault; default: six")
    parser.add_argument("--chains", type=int, default=7, help="chains of kills of each command")
    parser.add_argument("--kills", type=int, default=3, help="kills in a chain")
    parser.add_argument("--files", type=int, help="damaged files of each command; default: every file in three ways")
    parser.add_argument("--disks", type=int, default=4, help="full disks of each command")
    parser.add_argument("--faults", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ledger", type=Path, help="file of what was tried, which a later run goes on from")
    parser.add_argument("--minutes", type=float, help="after which no further fault is begun")
    options = parser.parse_args()
    kept = tempfile.mkdtemp(prefix="faults-")
    os.environ |= {"HF_DATASETS_CACHE": f"{kept}/cache", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    begun = time.monotonic()
    ledger = Ledger(options.ledger, options.minutes and 60 * options.minutes)
    try_all(options, Path(kept), ledger)
    for fault in options.faults:
        print(f"{fault} in all: {dict(sorted(ledger.counts(fault).items()))}")
    bad = ledger.bad()
    print(f"{len(ledger.found)} tried, {len(bad)} failures, {time.monotonic() - begun:.0f} s")
    if bad:
        print(f"What they left: {kept}")
    else:
        shutil.rmtree(kept)
    if ledger.out_of_time:
        print("The time was over before all were tried; the same command with this ledger goes on.")
    return int(bool(bad) or not ledger.found)


def import_libraries() -> None:
    """What the commands import, so that a process that is forked has it already."""
    import trl.trainer.dpo_trainer
    import trl.trainer.grpo_trainer
    import trl.trainer.reward_trainer
    import trl.trainer.sft_trainer  # noqa: F401

    import trl_ext.constrained_ppo.constrained_ppo_trainer
    import trl_ext.equilibrium.training
    import trl_ext.sparse_po.sparse_po_trainer  # noqa: F401


def try_all(options: argparse.Namespace, folder: Path, ledger: Ledger) -> None:
    """Tries each kind of fault on each command, and prints its counts as it goes."""
    import_libraries()
    from tests.faults import cases
    from tests.faults.commands import COMMANDS, Bench

    given, seed = (cases.References(Bench(folder)), ledger), options.seed
    tried = {
        "kill": lambda command: cases.kill_chains(*given, command, options.chains, options.kills, seed),
        "damage": lambda command: cases.damaged_files(*given, command, options.files, seed),
        "hand": lambda command: cases.damaged_by_hand(*given, command, min(options.files or 3, 3), seed),
        "disk": lambda command: cases.full_disks(*given, command, options.disks, seed),
        "settings": lambda command: cases.changed_settings(*given, command),
        "two": lambda command: cases.two_runs(*given, command),
    }
    for fault in options.faults:
        if fault == "disk" and not cases.can_mount():
            print("disk: left out, since this process may not mount")
            continue
        for command in options.commands or COMMANDS:
            tried[fault](command)
            print(f"{fault} {command}: {dict(sorted(ledger.counts(fault, command).items()))}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
