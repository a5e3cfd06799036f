"""The faults. Each function gives the verdicts of what it tried."""

import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.commands import STEPS, Bench, judged, what_it_left


RESUME = ("--resume_from_checkpoint", "true")
# Overrides of a resumed run: what it must say, or `None` where it goes on and lists the change
CHANGES = {
    "sparse-po": [
        (("--learning_rate", "0.002"), None), (("--max_steps", "8"), None), (("--beta", "0.3"), None),
        (("--mask_type", "activation", "--mask_learning_rate", "none"), "mask_type"), (("--optim", "sgdp"), "optim"),
    ],
    "constrained-ppo": [
        (("--learning_rate", "0.002"), None), (("--max_steps", "8"), None), (("--kl_coef", "0.3"), None),
        (("--critic", "separate"), "critic"), (("--method", "mu"), "method"), (("--optim", "sgdp"), "optim"),
        (("--reward_funcs", "tests.helpers.constrained_ppo.length", "tests.helpers.constrained_ppo.low_ids"),
         "rewards"),
    ],
    "dpo": [(("--learning_rate", "0.002"), None), (("--optim", "sgdp"), "optim"), (("--max_steps", "8"), None)],
    "equilibrium-reward": [(("--learning_rate", "0.002"), None), (("--optim", "adamp"), "optim")],
}  # fmt: skip


class References:
    """Runs without a fault, made once for each command."""

    def __init__(self, bench: Bench):
        self.bench, self._made = bench, {}

    def of(self, command: str) -> tuple[Path, dict[str, str], float]:
        """Output folder, what the run has computed, and its seconds."""
        if command not in self._made:
            output = self.bench.folder / f"reference-{command}"
            run = self.bench.run(command, output)
            assert run.status == 0, run.said()[-3000:]
            self._made[command] = (output, what_it_left(output), run.seconds)
        return self._made[command]

    def copy(self, command: str, output: Path) -> dict[str, str]:
        """The checkpoints of the run, without what it left at its end; gives what it has computed."""
        source, expected, _ = self.of(command)
        output.mkdir(parents=True)
        for checkpoint in source.glob("checkpoint-*"):
            shutil.copytree(checkpoint, output / checkpoint.name)
        return expected


def kill_chains(references: References, command: str, chains: int, kills: int, seed: int) -> Counter:
    """Kills a run at random moments, `kills` times in a row, and lets it come to its end."""
    draw, found = random.Random(seed), Counter()
    for chain in range(chains):
        _, expected, seconds = references.of(command)
        output = references.bench.folder / f"killed-{command}-{seed}-{chain}"
        for _ in range(kills):
            run = references.bench.start(command, output, *RESUME)
            time.sleep(draw.uniform(0.0, seconds))
            if not run.kill() and run.status != 0:
                break
            found["kills"] += 1
        run = references.bench.run(command, output, *RESUME)
        found[judged(run, output, expected)] += 1
        _keep(run, output, found)
    return found


def damage(path: Path, how: str, draw: random.Random) -> None:
    if how == "deleted":
        path.unlink()
    elif how == "halved":
        os.truncate(path, path.stat().st_size // 2)
    else:
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def damaged_files(references: References, command: str, limit: int | None, seed: int) -> Counter:
    """Damages one file of the newest checkpoint; the run goes on from the one before, or as if nothing had been."""
    draw, found = random.Random(seed), Counter()
    files = sorted(path.name for path in (references.of(command)[0] / f"checkpoint-{STEPS}").iterdir())
    cases = [(name, how) for name in files for how in ("deleted", "halved", "flipped")]
    for name, how in cases if limit is None else draw.sample(cases, limit):
        output = references.bench.folder / f"damaged-{command}-{name}-{how}"
        expected = references.copy(command, output)
        damage(output / f"checkpoint-{STEPS}" / name, how, draw)
        run = references.bench.run(command, output, *RESUME)
        found[judged(run, output, expected)] += 1
        _keep(run, output, found)
    return found


def damaged_by_hand(references: References, command: str, limit: int, seed: int) -> Counter:
    """The path of a damaged checkpoint is refused with the file, and the last whole one."""
    draw, found = random.Random(seed), Counter()
    checkpoint = references.of(command)[0] / f"checkpoint-{STEPS}"
    files = sorted(path.name for path in checkpoint.iterdir() if path.name != "trl_ext_checkpoint.json")
    for name in draw.sample(files, limit):
        output = references.bench.folder / f"by-hand-{command}-{name}"
        expected = references.copy(command, output)
        damage(output / checkpoint.name / name, draw.choice(("deleted", "halved", "flipped")), draw)
        run = references.bench.run(command, output, "--resume_from_checkpoint", str(output / checkpoint.name))
        verdict = judged(run, output, expected, (name,))
        names_good = f"checkpoint-{STEPS - 1}" in run.said()
        found[verdict if verdict != "refused" or names_good else "unclear"] += 1
        _keep(run, output, found)
    return found


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of a size in memory; needs the right to mount."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount() -> bool:
    """Whether this process may mount, found out with a command that changes nothing."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0


def full_disks(references: References, command: str, tries: int, seed: int) -> Counter:
    """The disk is full at some save; after room was made the run goes on, and ends as one that had room."""
    draw, found = random.Random(seed), Counter()
    source, expected, _ = references.of(command)
    of_one = sum(path.stat().st_size for path in (source / f"checkpoint-{STEPS}").rglob("*"))
    for number in range(tries):
        disk = references.bench.folder / f"disk-{command}-{number}"
        with small_disk(disk, int(draw.uniform(1.2, 4.5) * of_one) + 2**16):
            output = disk / "out"
            first = references.bench.run(command, output, log=disk.with_suffix(".log"))
            left = sorted(output.glob("checkpoint-*"))
            verdict = judged(first, output, expected, ("disk is full", "No space left"))
            subprocess.run(["mount", "-o", f"remount,size={20 * of_one}", str(disk)], check=True)
            if verdict in ("refused", "same") and not any("saving" in path.name for path in left):
                overrides = RESUME if left else ("--overwrite", "true")
                run = references.bench.run(command, output, *overrides, log=disk.with_suffix(".log"))
                verdict = judged(run, output, expected)
                _keep(run, output, Counter({verdict: 1}))
            else:
                _keep(first, output, Counter({verdict: 1}))
            found[verdict] += 1
    return found


def changed_settings(references: References, command: str) -> Counter:
    """A resumed run with another setting refuses it, or applies it and says so."""
    found = Counter()
    for number, (overrides, refusal) in enumerate(CHANGES[command]):
        output = references.bench.folder / f"changed-{command}-{number}"
        expected = references.copy(command, output)
        for step in range(4, STEPS + 1):
            shutil.rmtree(output / f"checkpoint-{step}")
        run = references.bench.run(command, output, *RESUME, *overrides)
        if refusal is not None:
            verdict = judged(run, output, expected, (f"`{refusal}`",))
        else:
            said = f"`{overrides[0][2:]}`" in run.said() and "differ" in run.said()
            verdict = "applied" if run.status == 0 and said else judged(run, output, expected)
        found[verdict] += 1
        _keep(run, output, Counter({verdict: 1}))
    return found


def two_runs(references: References, command: str) -> Counter:
    """A second run in one folder, beside the first and after it."""
    found = Counter()
    _, expected, seconds = references.of(command)
    output = references.bench.folder / f"two-{command}"
    first = references.bench.start(command, output)
    end = time.monotonic() + seconds + 60
    while not (output / ".trl_ext_lock.json").exists() and time.monotonic() < end:
        time.sleep(0.01)
    second = references.bench.run(command, output, *RESUME, log=output.with_suffix(".second.log"))
    first.wait()
    found[judged(second, output, expected, (f"process {first.pid}",))] += 1
    found["same" if first.status == 0 and what_it_left(output) == expected else "different"] += 1
    again = references.bench.run(command, output)
    found[judged(again, output, expected, ("has the checkpoints of another run",))] += 1
    ended = references.bench.run(command, output, *RESUME)
    found[judged(ended, output, expected)] += 1
    return found


def _keep(run, output: Path, found: Counter) -> None:
    """Leaves the traces of what must not be, and nothing of the rest."""
    if not found.keys() & {"different", "traceback", "unclear", "stuck"}:
        shutil.rmtree(output, ignore_errors=True)
