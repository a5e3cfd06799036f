"""How often a learned mask starts dead, zero on every token of a batch, by initialisation.

python -m tests.benchmarks.dead_masks --model playground --seeds 200
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.sparse_po import anisotropic_states
from trl_ext.playground import load_playground_dataset, resolve
from trl_ext.sparse_po.masks import LearnedTokenMask
from trl_ext.sparse_po.reference_pass import read_reference


def states_of(model_name: str, num_tokens: int = 128) -> torch.Tensor:
    """Standardized states of a model on playground text, `(L, num_tokens, H)`."""
    path = resolve(model_name) if model_name == "playground" else model_name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    text = " ".join(row["prompt"] + row["chosen"] for row in load_playground_dataset(20, 1)["train"])
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : num_tokens + 1]
    with torch.no_grad():
        return read_reference(model, "learned", ids, input_ids=ids, use_cache=False).layer_states


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", nargs="+", default=["playground"])
    parser.add_argument("--seeds", type=int, default=200)
    options = parser.parse_args()
    print("| states | init | dead masks | mean weight | share of zeros |\n|---|---|---|---|---|")
    for source in ("anisotropic noise", *options.model):
        fixed = None if source == "anisotropic noise" else states_of(source)
        for init in ("paper", "positive"):
            dead, means, zeros = 0, [], []
            for seed in range(options.seeds):
                states = anisotropic_states(seed) if fixed is None else fixed
                generator = torch.Generator().manual_seed(10_000 + seed)
                weights = LearnedTokenMask(states.size(0), states.size(2), init, generator)(states)
                dead += int((weights == 0).all())
                means.append(weights.mean().item())
                zeros.append((weights == 0).float().mean().item())
            print(
                f"| {source} | {init} | {100 * dead / options.seeds:.1f}% | {sum(means) / len(means):.3f} | "
                f"{sum(zeros) / len(zeros):.2f} |"
            )


if __name__ == "__main__":
    main()
