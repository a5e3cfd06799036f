"""
Which weights of current model families AdamP projects, read from `AdamP.report()`: small random models, trained on a
random language for a few steps.

python -m tests.benchmarks.projection_families --output docs/results/adamp_families.md
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from trl_ext.core.parameter_groups import decay_groups
from trl_ext.optim import AdamP


VOCABULARY = 128
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "GPT-2": ("gpt2", GPT2),
    "GPT-NeoX": ("gpt_neox", SIZES),
    "Phi": ("phi", SIZES),
    "Phi-3": ("phi3", SIZES),
    "Llama": ("llama", SIZES),
    "Mistral": ("mistral", SIZES),
    "Qwen2": ("qwen2", SIZES),
    "Cohere": ("cohere", SIZES),
    "GLM": ("glm", {**SIZES, "head_dim": 16}),
    "Granite": ("granite", SIZES),
    "Qwen3": ("qwen3", {**SIZES, "head_dim": 16}),
    "OLMo 2": ("olmo2", SIZES),
    "OLMo 3": ("olmo3", SIZES),
    "GLM-4": ("glm4", {**SIZES, "head_dim": 16}),
    "Gemma 2": ("gemma2", {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "Gemma 3": ("gemma3_text", {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16}),
}
OFTEN = 0.5


def random_language(num_sequences: int, length: int, seed: int) -> torch.Tensor:
    """Sequences of a random chain in which every token has four successors, `(num_sequences, length)`."""
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(3, VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(0))
    tokens = [torch.randint(3, VOCABULARY, (num_sequences,), generator=generator)]
    for _ in range(length - 1):
        choice = torch.randint(4, (num_sequences,), generator=generator)
        tokens.append(successors[tokens[-1], choice])
    return torch.stack(tokens, dim=1)


def report_of(model_type: str, sizes: dict, steps: int, seed: int, lora: bool = False) -> dict[str, dict]:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    optimizer = AdamP(decay_groups(model, 0.1, named=True), lr=1e-3)
    for step in range(steps):
        batch = random_language(8, 32, seed * steps + step)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return optimizer.report()


def by_role(report: dict[str, dict]) -> dict[str, tuple[str, float]]:
    """By the last module's name: the view and the share of steps, averaged over the layers."""
    shares = defaultdict(list)
    for name, row in report.items():
        role = re.sub(r"\.(weight|default)", "", name).split(".")[-1]
        shares[role].append((row["channel"], row["layer"]))
    found = {}
    for role, rows in shares.items():
        channel, layer = np.mean(rows, axis=0)
        found[role] = ("channel" if channel > layer else "layer", float(channel + layer))
    return found


def table_row(title: str, report: dict[str, dict]) -> str:
    roles = by_role(report)
    often = {role: found for role, found in roles.items() if found[1] > OFTEN}
    rest = [share for role, (_, share) in roles.items() if role not in often]
    hit = ", ".join(f"`{role}` {100 * share:.0f}% ({view})" for role, (view, share) in often.items()) or "none"
    partly = [f"`{role}` {100 * s:.0f}%" for role, (_, s) in roles.items() if role not in often and s > 0.1]
    others = f"{100 * np.mean(rest):.0f}%" + (f"; {', '.join(partly)}" if partly else "")
    return f"| {title} | {hit} | {others} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = [
        "| family | projected on more than half of the steps | others: mean share; single ones above 10% |",
        "|---|---|---|",
    ]
    for title, (model_type, sizes) in FAMILIES.items():
        lines.append(table_row(title, report_of(model_type, sizes, options.steps, seed=0)))
        print(lines[-1], flush=True)
    for title in ("Llama", "Gemma 3"):
        lines.append(table_row(f"LoRA on {title}", report_of(*FAMILIES[title], options.steps, seed=0, lora=True)))
        print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
