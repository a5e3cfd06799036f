"""
Make what the dialogue recipe trains on, from XDailyDialog's English files: a small dialogue model, an intent
classifier, and prompts with references and intents, split by dialogue.

python -m recipes.experiments.constrained_ppo_dailydialog.prepare --dialog_dir DATA/dialog \
    --output_dir outputs/dailydialog
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from .daily_dialog import END, Dialogue, read_dialogues, replies, split_dialogues
from .intent import train_intent_classifier


POLICY, FACTS, SPLITS = "policy", "facts.json", ("train", "validation", "test")
PAD = "<pad>"


def prepare(
    dialog_dir: str, folder: Path, policy_steps: int = 2000, num_context: int = 5, seed: int = 0
) -> dict[str, float]:
    """
    Makes policy, classifier and splits in `folder` where they are missing, and returns what is known of them: sizes,
    losses, the classifier's held-out accuracy, processor time in seconds.
    """
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


def build_tokenizer(dialogues: Sequence[Dialogue], vocabulary_size: int = 1500) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of the dialogues' words; the size counts `<pad>` and `</s>`."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import Metaspace as MetaspaceDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE(unk_token=PAD))
    tokenizer.pre_tokenizer, tokenizer.decoder = Metaspace(), MetaspaceDecoder()
    trainer = BpeTrainer(vocab_size=vocabulary_size, special_tokens=[PAD, END], show_progress=False)
    tokenizer.train_from_iterator((text for dialogue in dialogues for text in dialogue.utterances), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=PAD, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def train_policy(
    dialogues: Sequence[Dialogue],
    folder: str | Path,
    *,
    steps: int = 500,
    hidden_size: int = 96,
    num_layers: int = 2,
    batch_size: int = 16,
    length: int = 160,
    learning_rate: float = 4e-3,
    held_out: Sequence[Dialogue] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """
    Trains a Llama on the dialogues, one after the other with `</s>` after each utterance, and saves it to `folder`.

    Returns:
        `dict` with `parameters`, `epochs`, `loss` (training, last 50 steps) and `held_out_loss`, in nats for a token.
    """
    set_seed(seed)
    tokenizer = build_tokenizer(dialogues)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=num_layers, num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), max(1, steps))
    losses: list[float] = []
    rows, epoch = torch.empty(0, length, dtype=torch.long), 0
    for _ in range(steps):
        while len(rows) < batch_size:
            rows, epoch = torch.cat([rows, packed(dialogues, tokenizer, length, seed + epoch)]), epoch + 1
        batch, rows = rows[:batch_size], rows[batch_size:]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "epochs": epoch}
    if losses:
        facts["loss"] = sum(losses[-50:]) / len(losses[-50:])
    if held_out:
        batch = packed(held_out, tokenizer, length, 0)
        with torch.no_grad():
            facts["held_out_loss"] = model.eval()(input_ids=batch, labels=batch, use_cache=False).loss.item()
    return facts


def packed(dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerFast, length: int, seed: int) -> torch.Tensor:
    """The dialogues in random order as rows of `length` tokens, `(N, length)`; an incomplete last row is left out."""
    order = list(dialogues)
    random.Random(seed).shuffle(order)
    texts = ["".join(text + END for text in dialogue.utterances) for dialogue in order]
    ids = [token for row in tokenizer(texts)["input_ids"] for token in row]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = make_parser().parse_args(arguments)
    facts = prepare(options.dialog_dir, Path(options.output_dir), options.policy_steps, seed=options.seed)
    Console(highlight=False).print_json(json.dumps(facts))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dialog_dir", required=True, help="folder of XDailyDialog's English files")
    parser.add_argument("--output_dir", default="outputs/dailydialog", help="folder for what is made")
    parser.add_argument("--policy_steps", type=int, default=2000, help="optimizer steps of the dialogue model")
    parser.add_argument("--seed", type=int, default=0, help="seed of split and model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
