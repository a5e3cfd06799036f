"""What `trl-ext plan` says of small runs against the peak of this process's memory, or of the GPU's allocator.

Each case trains two steps by the command's own script in one process; what it adds to the memory held before it, model
and data included, is compared with the plan of one GPU under DDP, without the context of CUDA.

python -m tests.benchmarks.plan [--hidden_size 384] [--layers 6]
"""

import argparse
import contextlib
import importlib
import io
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import AutoConfig

from tests.benchmarks.peak_memory import PeakMemory
from tests.helpers.tiny import WORDS, save_tiny_model
from trl_ext import cli
from trl_ext.core.quiet import quiet_run
from trl_ext.plan.memory import need
from trl_ext.plan.of_recipe import plan_of
from trl_ext.scripts.recipe.stand_ins import light_parser


LENGTH, PROMPT, BATCH = 128, 64, 4
PROMPTS = {
    "max_completion_length": LENGTH - PROMPT,
    "num_generations": 4,
    "reward_funcs": ["tests.benchmarks.plan.words"],
}
LORA = {"use_peft": True, "lora_r": 16, "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SparsePO, learned masks": ("sparse-po", {"gradient_checkpointing": False}),
    "the same, checkpointed": ("sparse-po", {"gradient_checkpointing": True}),
    "the same, LoRA": ("sparse-po", {"gradient_checkpointing": False, **LORA}),
    "DPO, checkpointed": ("dpo", {"gradient_checkpointing": True}),
    "SFT with AdamP": ("sft", {"gradient_checkpointing": False, "optim": "adamp"}),
    "SFT with SGDP": ("sft", {"gradient_checkpointing": False, "optim": "sgdp"}),
    "reward model, equilibrium head": ("equilibrium-reward", {"gradient_checkpointing": False}),
    "constrained GRPO": ("constrained-grpo", {"gradient_checkpointing": False, **PROMPTS}),
    "PPO, critic apart": (
        "constrained-ppo",
        {"gradient_checkpointing": False, "method": "ppo", "critic": "separate", **PROMPTS, "num_generations": 1},
    ),
}  # fmt: skip


def words(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward: the number of words."""
    return [float(len(text.split())) for text in completions]


def rows(command: str) -> Dataset:
    """Rows whose tokens fill `LENGTH`."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(3, len(WORDS), (length,), generator=generator).tolist())

    count = 8 * BATCH
    if command == "sft":
        return Dataset.from_list([{"text": text(LENGTH)} for _ in range(count)])
    if command.startswith("constrained"):
        return Dataset.from_list([{"prompt": text(PROMPT)} for _ in range(count)])
    names = ("chosen", "rejected")
    return Dataset.from_list(
        [{"prompt": text(8), **{name: f" {text(LENGTH - 9)}" for name in names}} for _ in range(count)]
    )


def recipe(folder: Path, command: str, settings: dict[str, Any], steps: int) -> str:
    """The recipe of a case, in a file."""
    rows(command).to_json(folder / f"{command}.jsonl")
    stated = {
        "model_name_or_path": str(folder / "model"), "output_dir": str(folder / "out"), "max_steps": steps,
        "datasets": [{"path": "json", "data_files": str(folder / f"{command}.jsonl")}], "overwrite": True,
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(), "bf16": False, "report_to": "none", "disable_tqdm": True,
        "logging_steps": 100, **settings,
    }  # fmt: skip
    if not command.startswith("constrained"):
        stated["max_length"] = LENGTH
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(stated))
    return str(path)


def planned(path: str, command: str) -> tuple[int, float]:
    """Parameters of the policy, and MiB that the plan says."""
    module = cli.TRAINING_COMMANDS[command]
    parser: Any = light_parser(module)
    parser.check(["--config", path, "--trust_recipe_code"])
    plan = plan_of(parser.parsed, module.rpartition(".")[2], AutoConfig.from_pretrained, PROMPT)
    return int(plan.parts[0].parameters), need("DDP", plan.parts, plan.work, 1).total / 2**20


def measured(path: str, command: str) -> float:
    """MiB that the run adds."""
    script = importlib.import_module(cli.TRAINING_COMMANDS[command])
    parsed = script.make_parser().parse_args_and_config(["--config", path, "--trust_recipe_code"])
    with PeakMemory() as memory, quiet_run(), contextlib.redirect_stdout(io.StringIO()):
        script.main(*parsed)
    return memory.added


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    sizes = {
        "hidden_size": options.hidden_size, "num_hidden_layers": options.layers, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 8 * options.hidden_size // 3, "vocab_size": 320,
        "max_position_embeddings": 2 * LENGTH,
    }  # fmt: skip
    print("| run | parameters | planned MiB | measured MiB | error |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        warmed: set[str] = set()
        for case in options.cases:
            command, settings = CASES[case]
            if command not in warmed:  # what a command imports belongs to no run
                save_tiny_model(folder / "model", max_position_embeddings=2 * LENGTH)
                measured(recipe(folder, command, settings, 1), command)
                warmed.add(command)
            save_tiny_model(folder / "model", **sizes)
            path = recipe(folder, command, settings, 2)
            count, says = planned(path, command)
            found = measured(path, command)
            print(f"| {case} | {count:,} | {says:.0f} | {found:.0f} | {says / found - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
