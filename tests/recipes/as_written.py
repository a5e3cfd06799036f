"""Runs the recipes of the playground by the commands of their headers, each in a process of its own and to its end.

python -m tests.recipes.as_written [--recipes sparse_po/playground ...]

Prints one line for each: seconds, and the last logged numbers. Folders are those of the recipes, under outputs/.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import trl_ext
from trl_ext.scripts.recipe.strict_parser import load_recipe


ROOT = Path(trl_ext.__file__).parents[1]
RECIPES = {
    f"{path.parent.name}/{path.stem}": path
    for path in sorted((ROOT / "recipes").glob("*/*.yaml"))
    if load_recipe(path).get("model_name_or_path") == "playground"
}


def command_of(recipe: Path) -> list[str]:
    """The words of the command after `# Run:`, without `trl-ext`."""
    found = re.search(r"^# Run: +trl-ext (.+)$", recipe.read_text(), re.MULTILINE)
    assert found, f"{recipe} says no command"
    return shlex.split(found[1])


def said_to_be_run() -> set[Path]:
    """Recipes that the tables of recipes/ say we ran."""
    said = set()
    for page in (ROOT / "recipes").glob("*/README.md"):
        for name, run in re.findall(r"^\| \[`([^`]+)`\].*\| ([^|]+) \|$", page.read_text(), re.MULTILINE):
            said |= {page.parent / name} if run.startswith("yes") else set()
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    failed = 0
    for name in parser.parse_args().recipes:
        command = [sys.executable, "-m", "trl_ext.cli", *command_of(RECIPES[name])]
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - start
        failed += done.returncode != 0
        said = done.stderr[-3000:] if done.returncode else _last(ROOT / load_recipe(RECIPES[name])["output_dir"])
        print(f"{name}: {'FAILED' if done.returncode else 'ran'} in {seconds:.0f} s; {said}", flush=True)  # noqa: T201
    return int(failed > 0)


def _last(folder: Path) -> str:
    """The last logged numbers of a run, where it kept a state; else the names of its files."""
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        return ", ".join(sorted(path.name for path in folder.iterdir()))
    logged = [entry for entry in json.loads(states[-1].read_text())["log_history"] if "loss" in entry]
    return f"step {logged[-1]['step']}, loss {logged[-1]['loss']:.4g}"


if __name__ == "__main__":
    sys.exit(main())
