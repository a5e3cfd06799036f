"""
Evidence from one GPU: correctness of the kernels, and what the methods cost, in one JSON and one Markdown table.

Every section runs in a process of its own with its own limit of time, the most important first, so that a crash or a
hang loses nothing else. The next section imports its libraries while one runs, and waits for its turn.

python -m tests.gpu.run --output_dir outputs/gpu
"""

import argparse
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple


class Section(NamedTuple):
    """Where a section is, and the seconds that it may take."""

    module: str
    limit: int
    function: str = "run"


SECTIONS = {
    "environment": Section("environment", 60),
    "kernels": Section("kernels", 120),
    "optimizers": Section("optimizers", 180),
    "paired_head": Section("sparse_po", 90, "run_head"),
    "sparse_po": Section("sparse_po", 120),
    "equilibrium": Section("equilibrium", 60),
    "fsdp2": Section("fsdp2", 60),
    "large_tensor": Section("large_tensor", 60),
    "ppo": Section("ppo", 120),
    "sanitizer": Section("sanitizer", 150),
}
# A section is not started with less time than this
LEAST = 15
# How many times a section's limit, which is a GPU's, a busy CPU may take
DRY_PATIENCE = 4
LOG_TAIL = 4000


class Child:
    """
    A process for some sections: imports at once, runs each when it is told to, and answers.

    Args:
        names (`list[str]`):
            Of the sections, in their order.
        folder (`Path`):
            Where results and log are written.
        dry (`bool`):
            Tiny sizes on a CPU, kernels in Triton's interpreter.
    """

    def __init__(self, names: list[str], folder: Path, dry: bool):
        self.names, self.folder = names, folder
        self.log = folder / f".{names[0]}.log"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
        if dry:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "tests.gpu.run", "--sections", ",".join(names), "--output_dir", str(folder)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command + ["--dry"] * dry, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def finish(self, name: str, limit: float) -> dict[str, Any]:
        """Lets it run a section for at most so many seconds: its state, seconds, tables, and the log so far."""
        start = time.perf_counter()
        try:
            status = self._ask(limit)
        except BrokenPipeError:
            status = f"failed ({self.process.wait()})"
        if name == self.names[-1] or status.startswith("stopped"):
            self.stop()
        results = self.folder / f".{name}.json"
        tables = json.loads(results.read_text()) if results.exists() else {}
        results.unlink(missing_ok=True)
        log = "" if status == "ok" else self.log.read_text()[-LOG_TAIL:]
        return {"status": status, "seconds": round(time.perf_counter() - start, 1), "tables": tables, "log": log}

    def _ask(self, limit: float) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], limit)[0]:
            return f"stopped after {limit:.0f} s"
        answer = self.process.stdout.readline().decode().strip()
        return answer or f"failed ({self.process.wait()})"

    def runs(self, name: str) -> bool:
        """Whether it is alive and has the section."""
        return name in self.names and self.process.poll() is None

    def stop(self) -> None:
        """Ends the process and what it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_sections(names: list[str], folder: Path, dry: bool) -> None:
    """In the child: imports, then runs a section for each line it reads, and answers with its state."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print goes to the log
    import torch

    from .measuring import Record

    torch.set_num_threads(1 if dry else 8)
    for name in names:
        section, status = SECTIONS[name], "ok"
        try:
            module = importlib.import_module(f"tests.gpu.{section.module}")
            if section.function == "run" and hasattr(module, "prepare"):
                module.prepare(dry)
            # The collections between measurements are spared the libraries
            gc.freeze()
        except Exception:
            traceback.print_exc()
            status = "failed to start"
        if not sys.stdin.readline():
            return  # The parent is gone
        try:
            if status == "ok":
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                getattr(module, section.function)(Record(folder / f".{name}.json"), device, dry)
        except Exception:
            traceback.print_exc()
            status = "failed"
        answers.write(f"{status}\n")
        answers.flush()


def as_text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value).replace("|", "/").replace("\n", " ")
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:.1e}"


def markdown(results: dict[str, Any]) -> str:
    """One table for each table of each section."""
    parts = ["# Evidence from one GPU"]
    for name, result in results.items():
        parts.append(f"## {name}\n\n{result['status']}, {result['seconds']} s")
        for table, rows in result["tables"].items():
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(as_text(row.get(column, "")) for column in columns) + " |" for row in rows]
            parts.append(f"{table[0].upper()}{table[1:]}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def run_all(names: list[str], folder: Path, dry: bool, seconds: float) -> dict[str, Any]:
    """Every section in turn; what does not fit into the time is reported as not run."""
    results: dict[str, Any] = {}
    logs: list[str] = []
    end = time.perf_counter() + seconds
    child = ahead = None
    for place, name in enumerate(names):
        left = end - time.perf_counter()
        if left < LEAST:
            results[name] = {"status": "not run", "seconds": 0.0, "tables": {}, "log": ""}
            continue
        if child is None or not child.runs(name):
            # One import serves all sections of a dry run
            child, ahead = ahead or Child(names[place:] if dry else [name], folder, dry), None
        if ahead is None and not dry and place + 1 < len(names):
            ahead = Child([names[place + 1]], folder, dry)
        limit = SECTIONS[name].limit * (DRY_PATIENCE if dry else 1)
        results[name] = child.finish(name, min(limit, left))
        if not child.runs(name) or not dry:
            logs.append(f"==== {child.names[0]}\n{child.log.read_text()[-40_000:]}")
            child.log.unlink()
        write(results, logs, folder)
        sys.stdout.write(f"{name}: {results[name]['status']}, {results[name]['seconds']} s\n")
        sys.stdout.flush()
    if ahead is not None:
        ahead.stop()
        ahead.log.unlink()
    write(results, logs, folder)
    return results


def write(results: dict[str, Any], logs: list[str], folder: Path) -> None:
    (folder / "gpu.json").write_text(json.dumps(results, indent=1))
    (folder / "gpu.md").write_text(markdown(results))
    (folder / "gpu.log").write_text("\n".join(logs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="every section on a CPU, with tiny sizes")
    parser.add_argument("--only", default="", help="sections to run, with commas between them")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all sections together")
    parser.add_argument("--sections", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.sections:
        run_sections(options.sections.split(","), options.output_dir, options.dry)
        return 0
    names = options.only.split(",") if options.only else list(SECTIONS)
    unknown = set(names) - set(SECTIONS)
    if unknown:
        parser.error(f"--only: no section is called {sorted(unknown)}; there are {list(SECTIONS)}")
    results = run_all(names, options.output_dir, options.dry, options.seconds)
    sys.stdout.write("\n" + (options.output_dir / "gpu.md").read_text())
    return int(any(result["status"] != "ok" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
