"""
Two hosts on one machine: two network namespaces and a cable between them. `python -m tests.faults.two_hosts`, as root;
without the right to make namespaces it says so.

    both       the losses are those of one process with the same rows in a batch
    dies       one host is killed in mid-run: the other ends by itself, and a new start ends as if nothing had been
    cable      the cable is pulled: the hosts end after `ddp_timeout`

With `--launcher accelerate` each host runs `accelerate launch --num_machines 2`, with `--launcher deepspeed` what
DeepSpeed's `deepspeed` starts on each host; by default its process is forked from one that has imported the libraries,
with the environment that the launcher gives.
"""

import argparse
import base64
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


HOSTS = tuple(f"trl-ext-{os.getpid()}-{letter}" for letter in "ab")
ADDRESSES = ("10.93.7.1", "10.93.7.2")
PORT = 29610
PATIENCE = 400.0
_CLONE_NEWNET = 0x40000000


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """Why there can be no two hosts here."""
    try:
        with hosts():
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        return f"network namespaces cannot be made here, which takes root and `ip`: {said}"


@contextmanager
def hosts() -> Iterator[None]:
    """The two namespaces, as long as the context lasts."""
    made = []
    try:
        for host in HOSTS:
            _ip("netns", "add", host)
            made.append(host)
        _ip("link", "add", "trle0", "netns", HOSTS[0], "type", "veth", "peer", "name", "trle1", "netns", HOSTS[1])
        for number, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True)):
            _ip("-n", host, "address", "add", f"{address}/24", "dev", f"trle{number}")
            _ip("-n", host, "link", "set", f"trle{number}", "up")
            _ip("-n", host, "link", "set", "lo", "up")
        yield
    finally:
        for host in made:
            kill_all(host)
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)


def kill_all(host: str) -> None:
    """Kills every process of a host."""
    listed = subprocess.run(["ip", "netns", "pids", host], check=False, capture_output=True, text=True)
    for pid in listed.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


class Pair:
    """The same command on both hosts."""

    def __init__(self, launcher: str, bench, command: str, config: str, output: Path, overrides: tuple[str, ...]):
        from tests.helpers.launching import deepspeed_environment

        self.output, self.launcher = output, launcher
        self.logs = [output.with_name(f"{output.name}.{rank}.log") for rank in (0, 1)]
        arguments = ("--ddp_timeout", "20", *overrides)
        self.deepspeed = deepspeed_environment(f"{config}.yaml", "train") if "zero" in config else {}
        start = self._forked if launcher == "fork" else self._launched
        self.runs = [start(rank, bench, command, config, arguments) for rank in (0, 1)]

    def _forked(self, rank: int, bench, command: str, config: str, arguments: tuple[str, ...]):
        def move() -> None:
            with open(f"/var/run/netns/{HOSTS[rank]}") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            os.environ |= self.deepspeed | {
                "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT), "WORLD_SIZE": "2", "RANK": str(rank),
                "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": f"trle{rank}",
            }  # fmt: skip

        return bench.start(command, self.output, *arguments, log=self.logs[rank], first=move)

    def _launched(self, rank: int, bench, command: str, config: str, arguments: tuple[str, ...]) -> subprocess.Popen:
        from trl_ext.cli import TRAINING_COMMANDS

        words = [
            "ip", "netns", "exec", HOSTS[rank], sys.executable, *self.launcher_words(rank, config),
            TRAINING_COMMANDS[command], "--config", str(bench.recipe(command)), "--output_dir", str(self.output),
            "--trust_recipe_code", *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"trle{rank}", "DS_ACCELERATOR": "cpu"}
        if self.launcher == "deepspeed":
            environment |= self.deepspeed
        with self.logs[rank].open("w") as file:
            return subprocess.Popen(words, env=environment, stdout=file, stderr=file, start_new_session=True)

    def launcher_words(self, rank: int, config: str) -> list[str]:
        """What stands between the interpreter and the module that trains."""
        from trl_ext.cli import accelerate_config_path

        if self.launcher == "deepspeed":  # what its `deepspeed` starts on each host, over ssh
            world = base64.urlsafe_b64encode(json.dumps({"a": [0], "b": [0]}).encode()).decode()
            return [
                "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={rank}",
                f"--master_addr={ADDRESSES[0]}", f"--master_port={PORT}", "--no_local_rank", "--module",
            ]  # fmt: skip
        return [
            "-m", "accelerate.commands.launch", "--config_file", accelerate_config_path(config), "--num_machines", "2",
            "--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0],
            "--main_process_port", str(PORT), "--rdzv_backend", "static", "--mixed_precision", "no", "-m",
        ]  # fmt: skip

    def wait(self) -> list[int | None]:
        """The exit statuses; `None` for a process that was stuck."""
        return [run.wait(PATIENCE) for run in self.runs]

    def wait_for(self, checkpoint: str) -> None:
        end = time.monotonic() + PATIENCE
        while not (self.output / checkpoint).is_dir():
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-3000:] for log in self.logs)


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def scenario(bench, launcher: str, command: str, config: str, parts: list[str]) -> Iterator[str]:
    """What is tried, in words, as it is found; a fault raises."""
    from tests.faults.cases import RESUME
    from tests.faults.commands import what_it_left

    def folder(part: str) -> Path:
        return bench.folder / f"{part}-{command}-{config}"

    def start(part: str, *overrides: str) -> Pair:
        return Pair(launcher, bench, command, config, folder(part), overrides)

    named = f"{command}, {config}"
    both = start("both")
    assert both.wait() == [0, 0], both.said()
    if "both" in parts:
        one = bench.run(command, folder("one"), "--per_device_train_batch_size", "8")
        assert one.status == 0, one.said()
        found, expected = losses(folder("both")), losses(folder("one"))
        far = max(abs(a - b) / max(1e-6, abs(b)) for a, b in zip(found, expected, strict=True))
        assert far < 1e-3, (found, expected)
        yield f"{named}: {len(found)} losses of two hosts, the farthest from one process by {far:.1e} of it"
    if "dies" in parts:
        pair = start("dies")
        pair.wait_for("checkpoint-2")
        kill_all(HOSTS[1])
        begun = time.monotonic()
        statuses = pair.wait()
        assert all(statuses), (statuses, pair.said())
        yield f"{named}: one host killed, the other ended {time.monotonic() - begun:.0f} s later, statuses {statuses}"
        again = start("dies", *RESUME)
        assert again.wait() == [0, 0], again.said()
        assert what_it_left(folder("dies")) == what_it_left(folder("both")), folder("dies")
        yield f"{named}: started again it ends as if nothing had been"
    if "cable" in parts:
        pair = start("cable")
        pair.wait_for("checkpoint-1")
        _ip("-n", HOSTS[1], "link", "set", "trle1", "down")
        begun = time.monotonic()
        statuses = pair.wait()
        _ip("-n", HOSTS[1], "link", "set", "trle1", "up")
        assert all(statuses), (statuses, pair.said())
        yield f"{named}: cable pulled, both ended {time.monotonic() - begun:.0f} s later, statuses {statuses}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.two_hosts")
    parser.add_argument("--commands", nargs="+", default=["sparse-po", "constrained-ppo"])
    parser.add_argument("--configs", nargs="+", default=["ddp", "cpu_zero2", "cpu_zero3"])
    parser.add_argument("--parts", nargs="+", default=["both", "dies", "cable"])
    parser.add_argument("--launcher", choices=("fork", "accelerate", "deepspeed"), default="fork")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"Left out: {reason}")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="two-hosts-"))
    os.environ |= {"HF_DATASETS_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["DS_ACCELERATOR"] = "cpu"
    from tests.faults.__main__ import import_libraries
    from tests.faults.commands import Bench

    if any("zero" in config for config in options.configs):
        import tests.helpers.launched  # noqa: F401  (gloo in the place of an operation that takes minutes to compile)
    import_libraries()
    bench = Bench(folder)
    # Each process draws tokens of its own, and two would have other completions than one
    recipe = bench.recipe("constrained-ppo")
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "generation_kwargs": {"do_sample": False}}))
    with hosts():
        for config in options.configs:
            for command in options.commands:
                for line in scenario(bench, options.launcher, command, config, options.parts):
                    print(line, flush=True)
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
