"""
Puts the commands under faults and prints what came of it: `make faults`, or `python -m tests.faults --chains 1`.

Each fault ends in one of: the same weights, states and losses bit for bit as without it; refused with a message that
names the file, the setting or the other run; applied, for a setting that may change, and listed. Everything else is a
failure: another result, a traceback, a message that does not say what is wrong, a process that is stuck.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


BAD = ("different", "traceback", "unclear", "stuck")
GOOD = ("same", "refused", "applied")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--commands", nargs="+", help="commands under fault; default: six")
    parser.add_argument("--chains", type=int, default=6, help="chains of kills of each command")
    parser.add_argument("--kills", type=int, default=3, help="kills in a chain")
    parser.add_argument("--files", type=int, help="damaged files of each command; default: every file in three ways")
    parser.add_argument("--disks", type=int, default=4, help="full disks of each command")
    parser.add_argument("--faults", nargs="+", default=["kill", "damage", "hand", "disk", "settings", "two"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kept = tempfile.mkdtemp(prefix="faults-")
    os.environ |= {"HF_DATASETS_CACHE": f"{kept}/cache", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    begun = time.monotonic()
    bad = tried = 0
    for title, found in faults(options, Path(kept)):
        tried += found.total()
        bad += sum(found[verdict] for verdict in BAD)
        print(f"{title}: {', '.join(f'{count} {verdict}' for verdict, count in sorted(found.items()))}", flush=True)
    print(f"{bad} failures in {time.monotonic() - begun:.0f} s" + (f"; what they left: {kept}" if bad else ""))
    return int(bad > 0 or not tried)


def faults(options: argparse.Namespace, folder: Path):
    """What each kind of fault came to, as it is tried: title and counts."""
    import trl.trainer.dpo_trainer
    import trl.trainer.grpo_trainer
    import trl.trainer.reward_trainer
    import trl.trainer.sft_trainer  # noqa: F401

    import trl_ext.constrained_ppo.constrained_ppo_trainer
    import trl_ext.equilibrium.training
    import trl_ext.sparse_po.sparse_po_trainer  # noqa: F401
    from tests.faults import cases
    from tests.faults.commands import COMMANDS, Bench

    references = cases.References(Bench(folder))
    commands = options.commands or list(COMMANDS)
    tried = {
        "kill": lambda command: cases.kill_chains(references, command, options.chains, options.kills, options.seed),
        "damage": lambda command: cases.damaged_files(references, command, options.files, options.seed),
        "hand": lambda command: cases.damaged_by_hand(references, command, min(options.files or 3, 3), options.seed),
        "disk": lambda command: cases.full_disks(references, command, options.disks, options.seed),
        "settings": lambda command: cases.changed_settings(references, command),
        "two": lambda command: cases.two_runs(references, command),
    }
    for fault in options.faults:
        if fault == "disk" and not cases.can_mount():
            yield "disk: left out, since this process may not mount", Counter()
            continue
        total: Counter = Counter()
        for command in commands:
            if fault == "settings" and command not in cases.CHANGES:
                continue
            found = tried[fault](command)
            total += found
            yield f"{fault} {command}", found
        print(f"{fault} in all: {dict(total)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
