"""Trains with axolotl itself, as released: each configuration in a process of its own, on a tiny model and a CPU.

Needs an environment with axolotl, which pins other versions than this package is developed with; `make axolotl` makes
one. Prints one line for each case: what was trained, or the sentence with which it was refused.

python -m tests.integrations.axolotl_run [--cases adamp sgdp ...]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from packaging.version import Version

from tests.helpers.tiny import WORDS, save_tiny_model, tiny_pairs, tiny_tokenizer
from trl_ext._upstream import OLDEST_TRL


STEPS = 2
COMMON = {
    "plugins": ["trl_ext.integrations.axolotl.TRLExtPlugin"], "sequence_len": 64, "micro_batch_size": 2,
    "gradient_accumulation_steps": 1, "num_epochs": 1, "max_steps": STEPS, "save_steps": STEPS, "logging_steps": 1,
    "learning_rate": 1.0e-3, "lr_scheduler": "constant", "bf16": False, "fp16": False, "tf32": False,
    "gradient_checkpointing": False, "val_set_size": 0, "seed": 1, "dataset_num_proc": 1, "weight_decay": 0.01,
}  # fmt: skip
REWARD = {"reward_model": True, "model_type": "AutoModelForSequenceClassification", "num_labels": 1,
          "remove_unused_columns": False}  # fmt: skip
GRPO = {"rl": "grpo", "trl": {"reward_funcs": ["tests.integrations.axolotl_run.words"], "num_generations": 2,
                              "max_completion_length": 8}}  # fmt: skip
CONSTRAINTS = [{"reward": "words", "threshold": 4.0}]
# The data's kind, the keys, and a key of the optimizer's groups or a file of the checkpoint that tells the method
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "adamp": ("text", {"optimizer": "adamp", "optim_args": {"wd_ratio": 0.25}}, "wd_ratio"),
    "sgdp": ("text", {"optimizer": "sgdp", "optim_args": "nesterov=true"}, "nesterov"),
    "adamp under DPO": ("pairs", {"rl": "dpo", "optimizer": "adamp"}, "wd_ratio"),
    "ep_reward": ("reward", {**REWARD, "optimizer": "adamp", "trl_ext": {"method": "ep_reward"}}, "wd_ratio"),
    "sparse_po": (
        "pairs", {"rl": "dpo", "optimizer": "adamp", "trl_ext": {"method": "sparse_po"}}, "token_masks.safetensors"
    ),
    "constrained_grpo": (
        "prompts", {**GRPO, "trl_ext": {"method": "constrained_grpo", "constraints": CONSTRAINTS}}, "multipliers.json"
    ),
    "constrained_ppo": (
        "prompts",
        {**GRPO, "trl_ext": {"method": "constrained_ppo", "constraints": CONSTRAINTS, "num_generations": 1}},
        "critic.safetensors",
    ),
}  # fmt: skip


def words(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """A reward: the number of words."""
    return [float(len(text.split())) for text in completions]


def write_data(folder: Path) -> None:
    """The four kinds of data, and the two models."""
    pairs = tiny_pairs(16).to_list()
    rows = {
        "text": [{"text": row["prompt"] + row["chosen"]} for row in pairs],
        "pairs": pairs,
        "prompts": [{"prompt": row["prompt"]} for row in pairs],
        "reward": [{"system": "", "input": row["prompt"], "chosen": row["chosen"].strip(),
                    "rejected": row["rejected"].strip()} for row in pairs],
    }  # fmt: skip
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    save_tiny_model(folder / "model")
    from trl_ext import EPModelForSequenceClassification

    model = EPModelForSequenceClassification.from_pretrained(str(folder / "model"), num_labels=1, hidden_features=[8])
    model.save_pretrained(folder / "ep_model")
    tiny_tokenizer().save_pretrained(folder / "ep_model")
    assert len(WORDS) == model.config.get_text_config().vocab_size


def configuration(folder: Path, kind: str, own: dict[str, Any]) -> dict[str, Any]:
    """axolotl's configuration of a case."""
    data: dict[str, Any] = {"path": str(folder / f"{kind}.jsonl"), "ds_type": "json", "split": "train"}
    if kind == "text":
        data["type"] = "completion"
    if kind == "reward":
        data["type"] = "bradley_terry.chat_template"
    if kind == "prompts":
        data["type"] = None
    return {
        **COMMON, **own, "base_model": str(folder / ("ep_model" if kind == "reward" else "model")), "datasets": [data],
        "output_dir": str(folder / "out"), "dataset_prepared_path": str(folder / "prepared"),
        **({"chat_template": "tokenizer_default"} if kind == "reward" else {}),
    }  # fmt: skip


def trained(folder: Path, mark: str) -> str:
    """What the last checkpoint says, after a look at whether it is the method's."""
    checkpoint = folder / "out" / f"checkpoint-{STEPS}"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    own = (checkpoint / mark).is_file() if "." in mark else all(mark in group for group in groups)
    files = sorted(path.name for path in checkpoint.iterdir())
    assert own, f"{mark} is neither in the optimizer's groups nor among {files}"
    losses = [round(entry["loss"], 4) for entry in state["log_history"] if "loss" in entry]
    return f"{state['global_step']} steps, losses {losses}; {mark} is there"


def run(name: str) -> tuple[bool, str]:
    """Whether a case did what it should, and what it said."""
    kind, own, mark = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(configuration(folder, kind, own)))
        variables = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        done = subprocess.run(
            [sys.executable, "-m", "axolotl.cli.train", str(folder / "config.yaml")],
            env={**os.environ, **variables}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        method = own.get("trl_ext", {}).get("method", "ep_reward")
        if method != "ep_reward" and Version(version("trl")) < Version(OLDEST_TRL):
            said = [line for line in done.stderr.splitlines() if line.startswith("ImportError: SparsePOTrainer")]
            return done.returncode != 0 and bool(said), f"refused: {said[0]}" if said else done.stderr[-4000:]
        if done.returncode:
            return False, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return True, trained(folder, mark)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    names = ("axolotl", "trl", "transformers", "accelerate", "peft", "datasets", "torch")
    print(" ".join(f"{name}=={version(name)}" for name in names), flush=True)
    failed = 0
    for name in parser.parse_args().cases:
        well, said = run(name)
        failed += not well
        print(f"{name}: {'' if well else 'FAILED: '}{said}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
