"""Trains with LLaMA-Factory or ms-swift, as released, by the files and commands of their pages in docs/, on a CPU.

Each needs an environment of its own, whose versions its page names.

python -m tests.integrations.other_trainers_run llama_factory
python -m tests.integrations.other_trainers_run ms_swift
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.helpers.tiny import save_tiny_model, tiny_pairs


DOCS = Path(__file__).parents[2] / "docs"
STEPS = 2
PACKAGES = ("trl", "transformers", "accelerate", "peft", "datasets", "torch")


def code_of(page: str, language: str) -> str:
    """The first block of a page in a language."""
    found = re.search(rf"```{language}\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert found, f"{page}.md has no block of {language}"
    return found[1]


def write(folder: Path, page: str) -> list[str]:
    """The page's file and settings, with a tiny model and data in the place of the page's; returns the command."""
    pairs = tiny_pairs(16).to_list()
    save_tiny_model(folder / "model")
    if page == "llama_factory":
        rows = [{"instruction": row["prompt"], "input": "", "output": row["chosen"]} for row in pairs]
        (folder / "own.json").write_text(json.dumps(rows))
        (folder / "dataset_info.json").write_text(json.dumps({"own": {"file_name": "own.json"}}))
        (folder / "train.py").write_text(code_of(page, "python"))
        (folder / "config.yaml").write_text(code_of(page, "yaml"))
        own = {"model_name_or_path": "model", "dataset": "own", "dataset_dir": ".", "template": "empty",
               "cutoff_len": 64, "output_dir": "out", "max_steps": STEPS, "save_steps": STEPS, "logging_steps": 1,
               "use_cpu": "true", "bf16": "false", "report_to": "none", "per_device_train_batch_size": 2}  # fmt: skip
        return [sys.executable, "train.py", "config.yaml", *(f"{name}={value}" for name, value in own.items())]
    rows = [{"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]}
            for row in pairs]  # fmt: skip
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.py").write_text(code_of(page, "python"))
    words = shlex.split(code_of(page, "text").split("\n\n")[0].replace("\\\n", " "))
    given = {"--model": "model", "--dataset": "own.jsonl"}
    words = [given.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    own = {"--model_type": "llama", "--template": "dummy", "--max_length": 64, "--output_dir": "out",
           "--max_steps": STEPS, "--save_steps": STEPS, "--logging_steps": 1, "--use_cpu": "true",
           "--report_to": "none", "--torch_dtype": "float32", "--per_device_train_batch_size": 2,
           "--add_version": "false", "--split_dataset_ratio": 0, "--dataset_num_proc": 1,
           "--dataloader_num_workers": 0}  # fmt: skip
    return [sys.executable, *words[1:], *(str(word) for pair in own.items() for word in pair)]


def trained(folder: Path) -> str:
    """What the checkpoint says of the optimizer and of the losses."""
    (path,) = folder.glob(f"out/**/checkpoint-{STEPS}/optimizer.pt")
    groups = torch.load(path, weights_only=True)["param_groups"]
    options = [{name: group[name] for name in ("delta", "wd_ratio", "weight_decay")} for group in groups]
    history = json.loads((path.parent / "trainer_state.json").read_text())["log_history"]
    return f"losses {[round(entry['loss'], 4) for entry in history if 'loss' in entry]}; AdamP's groups: {options}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=("llama_factory", "ms_swift"))
    page = parser.parse_args().trainer
    name = {"llama_factory": "llamafactory", "ms_swift": "ms-swift"}[page]
    print(" ".join(f"{package}=={version(package)}" for package in (name, *PACKAGES)), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = write(folder, page)
        variables: dict[str, Any] = {
            **os.environ, "HF_HUB_OFFLINE": "1", "USE_HF": "1", "DISABLE_VERSION_CHECK": "1", "WANDB_MODE": "disabled",
            "PYTHONPATH": os.pathsep.join([str(DOCS.parent), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
        }  # fmt: skip
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"FAILED: {shlex.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
            return 1
        print(trained(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
