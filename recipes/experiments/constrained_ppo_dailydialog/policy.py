"""A small dialogue model, trained from scratch on the dialogues."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from .daily_dialog import END, Dialogue


PAD = "<pad>"


def build_tokenizer(dialogues: Sequence[Dialogue], vocabulary_size: int = 1500) -> PreTrainedTokenizerFast:
    """
    Byte-pair encoding of the dialogues' words.

    Args:
        dialogues (`Sequence[Dialogue]`):
            Training dialogues.
        vocabulary_size (`int`, *optional*, defaults to `1500`):
            Tokens, `<pad>` and `</s>` included.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]
    """
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
    Trains a Llama on the dialogues, one after the other with `</s>` after each utterance, and saves it.

    Args:
        dialogues (`Sequence[Dialogue]`):
            Training dialogues.
        folder (`str` or `Path`):
            Where model and tokenizer are saved.
        steps (`int`, *optional*, defaults to `500`):
            Optimizer steps.
        hidden_size (`int`, *optional*, defaults to `96`):
            Width.
        num_layers (`int`, *optional*, defaults to `2`):
            Layers.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows of a step.
        length (`int`, *optional*, defaults to `160`):
            Tokens of a row.
        learning_rate (`float`, *optional*, defaults to `4e-3`):
            Peak learning rate of AdamW, cosine schedule.
        held_out (`Sequence[Dialogue]`, *optional*):
            Dialogues for the held-out loss.
        seed (`int`, *optional*, defaults to `0`):
            Seed.

    Returns:
        `dict` with `parameters`, `loss` (training, last 50 steps) and `held_out_loss`, in nats for a token.
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
