"""The playground's base model: a small Llama, trained from scratch on the grammar's reviews and cached."""

import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from inspect import getsource
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup, set_seed

from .grammar import generate_review, vocabulary
from .tokenizer import EOS, PAD, build_tokenizer


@dataclass(frozen=True)
class BaseModelSettings:
    """
    Everything that decides the base model.

    Attributes:
        seed (`int`): Seed of weights and text.
        steps (`int`): Optimizer steps.
        batch_size (`int`): Reviews in one step.
        learning_rate (`float`): Peak learning rate of AdamW, cosine schedule.
        hidden_size (`int`): Width.
        intermediate_size (`int`): Width of the MLP.
        num_layers (`int`): Decoder layers.
        num_heads (`int`): Attention heads.
        num_drafts (`int`): Drafts of a review, of which the one of the strongest sentiment is learnt.
    """

    seed: int = 0
    steps: int = 340
    batch_size: int = 48
    learning_rate: float = 4e-3
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_drafts: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "seed" and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")

    @classmethod
    def of_one_mind(cls, hidden_size: int = 64, num_layers: int = 2) -> "BaseModelSettings":
        """
        A smaller model of reviews whose sentiment is pronounced: it over-optimises a reward within 32 updates.

        Args:
            hidden_size (`int`, *optional*, defaults to `64`):
                Width.
            num_layers (`int`, *optional*, defaults to `2`):
                Decoder layers.

        Returns:
            [`BaseModelSettings`]
        """
        return cls(
            steps=400, learning_rate=8e-3, hidden_size=hidden_size, intermediate_size=3 * hidden_size,
            num_layers=num_layers, num_drafts=4,
        )  # fmt: skip

    def key(self) -> str:
        """Hash of the settings, the vocabulary, a sample of the corpus, the training code and the torch version."""
        generator = random.Random("key")
        sample = [generate_review(generator).text for _ in range(500)]
        content = json.dumps([asdict(self), vocabulary(), sample, getsource(_train), torch.__version__])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """The user's cache folder of the package: below `XDG_CACHE_HOME` where set, else `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl_ext" / "playground"


def base_model_path(
    cache_dir: str | Path | None = None,
    seed: int = 0,
    show_progress: bool = True,
    settings: BaseModelSettings | None = None,
) -> Path:
    """
    Folder of the base model and its tokenizer; trains it on the first call, in about a minute on two cores.

    Args:
        cache_dir (`str` or `Path`, *optional*):
            Where models are kept. Defaults to [`cache_folder`].
        seed (`int`, *optional*, defaults to `0`):
            Seed, where `settings` is not given.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        settings ([`BaseModelSettings`], *optional*):
            Settings.

    Returns:
        `Path`
    """
    settings = settings or BaseModelSettings(seed=seed)
    root = Path(cache_dir) if cache_dir is not None else cache_folder()
    folder = root / settings.key()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder) + ".lock"):
        if not (folder / "config.json").is_file():
            partial = Path(tempfile.mkdtemp(dir=root))
            try:
                with _alone():
                    _train(settings, show_progress).save_pretrained(partial)
                build_tokenizer().save_pretrained(partial)
                partial.replace(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextmanager
def _alone() -> Iterator[None]:
    """One thread, on which sums depend, and the process's random numbers as they were."""
    threads, states = torch.get_num_threads(), (random.getstate(), np.random.get_state(), torch.get_rng_state())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def build_model(settings: BaseModelSettings) -> LlamaForCausalLM:
    """The untrained model, about 0.9M parameters at the default settings."""
    tokenizer = build_tokenizer()
    set_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    return LlamaForCausalLM(config)


def _train(settings: BaseModelSettings, show_progress: bool) -> LlamaForCausalLM:
    state = torch.random.get_rng_state()
    tokenizer, model = build_tokenizer(), build_model(settings)
    generator = random.Random(f"corpus-{settings.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98))
    warmup = max(1, settings.steps // 20)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, settings.steps)
    interval = 2.0 if sys.stderr.isatty() else 30.0
    steps = tqdm(
        range(settings.steps), desc="Training the playground's base model", mininterval=interval,
        disable=not show_progress,
    )  # fmt: skip
    for _ in steps:
        texts = [
            generate_review(generator, num_drafts=settings.num_drafts).text + EOS for _ in range(settings.batch_size)
        ]
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    torch.random.set_rng_state(state)
    return model.eval()
