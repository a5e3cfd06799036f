# /// script
# dependencies = ["trl-ext[dialog]"]
# ///
"""
Make what the dialogue recipe trains on, from XDailyDialog's English files: a small dialogue model, an intent
classifier, and prompts with references and intents, split by dialogue.

python -m trl_ext.scripts.prepare_dialog --dialog_dir DATA/dialog --output_dir outputs/dailydialog
"""

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console


POLICY, FACTS, SPLITS = "policy", "facts.json", ("train", "validation", "test")


def prepare(
    dialog_dir: str, folder: Path, policy_steps: int = 2000, num_context: int = 5, seed: int = 0
) -> dict[str, float]:
    """
    Makes policy, classifier and splits where they are missing.

    Args:
        dialog_dir (`str`):
            Folder of the dialogues.
        folder (`Path`):
            Folder for `policy`, `intent_classifier.json`, `train.jsonl`, `validation.jsonl`, `test.jsonl` and
            `facts.json`.
        policy_steps (`int`, *optional*, defaults to `2000`):
            Optimizer steps of the policy.
        num_context (`int`, *optional*, defaults to `5`):
            Most utterances before a reply.
        seed (`int`, *optional*, defaults to `0`):
            Seed of split and policy.

    Returns:
        `dict[str, float]`: sizes, losses, the classifier's held-out accuracy, processor time in seconds.
    """
    from ..dialog.daily_dialog import read_dialogues, replies, split_dialogues
    from ..dialog.intent import train_intent_classifier
    from ..dialog.policy import train_policy

    if (folder / FACTS).is_file():
        return json.loads((folder / FACTS).read_text())
    folder.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    parts = split_dialogues(read_dialogues(dialog_dir), seed=seed)
    facts: dict[str, float] = {}
    for name, dialogues in zip(SPLITS, parts, strict=True):
        rows = replies(dialogues, num_context)
        rows.to_json(folder / f"{name}.jsonl")
        facts |= {f"{name}_dialogues": len(dialogues), f"{name}_replies": len(rows)}
    classifier, measured = train_intent_classifier(parts[0], parts[2])
    classifier.save(folder)
    facts |= {f"classifier_{name}": value for name, value in measured.items()}
    trained = train_policy(parts[0], folder / POLICY, steps=policy_steps, held_out=parts[1], seed=seed)
    facts |= {f"policy_{name}": value for name, value in trained.items()}
    facts["cpu_seconds"] = time.process_time() - start
    (folder / FACTS).write_text(json.dumps(facts, indent=1))
    return facts


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = make_parser(prog).parse_args(arguments)
    facts = prepare(options.dialog_dir, Path(options.output_dir), options.policy_steps, seed=options.seed)
    Console(highlight=False).print_json(json.dumps(facts))
    return 0


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command's options."""
    parser = argparse.ArgumentParser(
        prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dialog_dir", required=True, help="folder of XDailyDialog's English files")
    parser.add_argument("--output_dir", default="outputs/dailydialog", help="folder for what is made")
    parser.add_argument("--policy_steps", type=int, default=2000, help="optimizer steps of the dialogue model")
    parser.add_argument("--seed", type=int, default=0, help="seed of split and model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
