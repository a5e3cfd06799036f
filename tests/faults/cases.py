"""The faults. Each function tries those of its cases that are left, and notes what came of each in the ledger."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.commands import STEPS, Bench, judged, what_it_left
from tests.faults.ledger import BAD, Ledger


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


def kill_chains(references: References, ledger: Ledger, command: str, chains: int, kills: int, seed: int) -> None:
    """Kills a run at random moments, `kills` times in a row, and lets it come to its end."""
    for case in ledger.left(f"kill {command} {seed} {chain}" for chain in range(chains)):
        draw, killed, run = random.Random(case), 0, None
        _, expected, seconds = references.of(command)
        output = references.bench.folder / case.replace(" ", "-")
        for _ in range(2 * kills):  # a run may be at its end before it is killed
            if killed == kills or (run is not None and run.status not in (0, -signal.SIGKILL)):
                break
            run = references.bench.start(command, output, *RESUME)
            time.sleep(draw.uniform(0.0, seconds * (0.7 if killed else 1.0)))
            killed += run.kill()
        if run is None or run.status in (0, -signal.SIGKILL):  # an error between two kills is judged as it is
            run = references.bench.run(command, output, *RESUME)
        _keep(run, output, ledger.note(case, judged(run, output, expected), killed))


def damage(path: Path, how: str, draw: random.Random) -> None:
    if how == "deleted":
        path.unlink()
    elif how == "halved":
        os.truncate(path, path.stat().st_size // 2)
    else:
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def damaged_files(references: References, ledger: Ledger, command: str, limit: int | None, seed: int) -> None:
    """Damages one file of the newest checkpoint; the run goes on from the one before, or as if nothing had been."""
    files = sorted(path.name for path in (references.of(command)[0] / f"checkpoint-{STEPS}").iterdir())
    cases = [f"damage {command} {name} {how}" for name in files for how in ("deleted", "halved", "flipped")]
    for case in ledger.left(cases if limit is None else random.Random(seed).sample(cases, limit)):
        _, _, name, how = case.split()
        output = references.bench.folder / case.replace(" ", "-")
        expected = references.copy(command, output)
        damage(output / f"checkpoint-{STEPS}" / name, how, random.Random(f"{case} {seed}"))
        run = references.bench.run(command, output, *RESUME)
        _keep(run, output, ledger.note(case, judged(run, output, expected)))


def damaged_by_hand(references: References, ledger: Ledger, command: str, limit: int, seed: int) -> None:
    """The path of a damaged checkpoint is refused with the file, and the last whole one."""
    draw, checkpoint = random.Random(seed), references.of(command)[0] / f"checkpoint-{STEPS}"
    files = sorted(path.name for path in checkpoint.iterdir() if path.name != "trl_ext_checkpoint.json")
    for case in ledger.left(f"hand {command} {name}" for name in draw.sample(files, limit)):
        name, output = case.split()[2], references.bench.folder / case.replace(" ", "-")
        expected = references.copy(command, output)
        draw = random.Random(f"{case} {seed}")
        damage(output / checkpoint.name / name, draw.choice(("deleted", "halved", "flipped")), draw)
        run = references.bench.run(command, output, "--resume_from_checkpoint", str(output / checkpoint.name))
        verdict = judged(run, output, expected, (name,))
        if verdict == "refused" and f"checkpoint-{STEPS - 1}" not in run.said():
            verdict = "unclear"
        _keep(run, output, ledger.note(case, verdict))


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


def full_disks(references: References, ledger: Ledger, command: str, tries: int, seed: int) -> None:
    """The disk is full at some save; after room was made the run goes on, and ends as one that had room."""
    for case in ledger.left(f"disk {command} {seed} {number}" for number in range(tries)):
        source, expected, _ = references.of(command)
        of_one = sum(path.stat().st_size for path in (source / f"checkpoint-{STEPS}").rglob("*"))
        disk = references.bench.folder / case.replace(" ", "-")
        with small_disk(disk, int(random.Random(case).uniform(1.2, 4.5) * of_one) + 2**16):
            output = disk / "out"
            run = references.bench.run(command, output, log=disk.with_suffix(".log"))
            left = sorted(output.glob("checkpoint-*"))
            verdict = judged(run, output, expected, ("disk is full", "No space left"))
            subprocess.run(["mount", "-o", f"remount,size={20 * of_one}", str(disk)], check=True)
            if verdict in ("refused", "same") and not any("saving" in path.name for path in left):
                overrides = RESUME if left else ("--overwrite", "true")
                run = references.bench.run(command, output, *overrides, log=disk.with_suffix(".log"))
                verdict = judged(run, output, expected)
            _keep(run, output, ledger.note(case, verdict))


def changed_settings(references: References, ledger: Ledger, command: str) -> None:
    """A resumed run with another setting refuses it, or applies it and says so."""
    for case in ledger.left(f"settings {command} {number}" for number in range(len(CHANGES.get(command, ())))):
        overrides, refusal = CHANGES[command][int(case.split()[2])]
        output = references.bench.folder / case.replace(" ", "-")
        expected = references.copy(command, output)
        for step in range(4, STEPS + 1):
            shutil.rmtree(output / f"checkpoint-{step}")
        run = references.bench.run(command, output, *RESUME, *overrides)
        if refusal is not None:
            verdict = judged(run, output, expected, (f"`{refusal}`",))
        else:
            said = f"`{overrides[0][2:]}`" in run.said() and "differ" in run.said()
            verdict = "applied" if run.status == 0 and said else judged(run, output, expected)
        _keep(run, output, ledger.note(case, verdict))


def two_runs(references: References, ledger: Ledger, command: str) -> None:
    """A second run in one folder, beside the first and after it."""
    cases = [f"two {command} {name}" for name in ("beside", "first", "after", "resumed")]
    if not list(ledger.left(cases)):
        return
    _, expected, seconds = references.of(command)
    output = references.bench.folder / f"two-{command}"
    first = references.bench.start(command, output)
    end = time.monotonic() + seconds + 60
    while not (output / ".trl_ext_lock.json").exists() and time.monotonic() < end:
        time.sleep(0.01)
    second = references.bench.run(command, output, *RESUME, log=output.with_suffix(".second.log"))
    refusals = [f"process {first.pid}"]
    # Under load the first may have ended between the second's looks, for a checkpoint and into the folder
    if not (output / ".trl_ext_lock.json").exists():
        refusals.append("has the checkpoints of another run")
    first.wait()
    ledger.note(cases[0], judged(second, output, expected, tuple(refusals)))
    ledger.note(cases[1], "same" if first.status == 0 and what_it_left(output) == expected else "different")
    again = references.bench.run(command, output)
    ledger.note(cases[2], judged(again, output, expected, ("has the checkpoints of another run",)))
    ended = references.bench.run(command, output, *RESUME)
    _keep(ended, output, ledger.note(cases[3], judged(ended, output, expected)))


def _keep(run, output: Path, verdict: str) -> None:
    """Leaves the traces of what must not be, and nothing of the rest."""
    if verdict not in BAD:
        shutil.rmtree(output, ignore_errors=True)
        run.log.unlink(missing_ok=True)
