"""Texts of the two tasks, and what the sentence encoder makes of them."""

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from trl_ext.equilibrium.modeling import pooled_states


SPLITS = ("train", "validation", "test")


@dataclass
class Split:
    """
    Texts of one split and what the model reads of them.

    Attributes:
        texts (`list[str]`): Texts; pairs lie as chosen, rejected, chosen, ....
        labels (`torch.Tensor` of shape `(N,)`, int64): Classes; none for pairs.
        inputs (`tuple[torch.Tensor, ...]`): `(N, H)` features, or states `(N, T, H)` and mask `(N, T)`.
    """

    texts: list[str]
    labels: torch.Tensor
    inputs: tuple[torch.Tensor, ...] = ()

    @property
    def size(self) -> int:
        """Texts of an answer: one of a class, two of a pair."""
        return 1 if len(self.labels) else 2

    def first(self, count: int) -> "Split":
        """The first texts only; `count` is even."""
        return Split(self.texts[:count], self.labels[:count], tuple(tensor[:count] for tensor in self.inputs))


def read_texts(task: str, imdb_dir: str, hh_file: str, sizes: tuple[int, int, int]) -> dict[str, Split]:
    """
    The splits of a task.

    Args:
        task (`str`):
            `"imdb"` or `"hh"`.
        imdb_dir (`str`):
            Folder with `imdb_train.parquet` and `imdb_test.parquet` (columns `text` and `label`).
        hh_file (`str`):
            Preference pairs (`chosen`, `rejected`), JSON lines, maybe gzipped.
        sizes (`tuple[int, int, int]`):
            Texts to train on, to choose on and to test on, even numbers; of pairs half as many.

    Returns:
        `dict[str, Split]`: by the names in `SPLITS`.

    Raises:
        ValueError: If there are fewer pairs than asked for.
    """
    if task == "imdb":
        frames = [
            pd.read_parquet(Path(imdb_dir) / f"imdb_{name}.parquet").sample(frac=1, random_state=0)
            for name in ("train", "test")
        ]
        parts = [frames[0][: sizes[0]], frames[0][sizes[0] : sizes[0] + sizes[1]], frames[1][: sizes[2]]]
        return {
            name: Split(
                [text.replace("<br />", " ") for text in part["text"]], torch.tensor(part["label"].to_numpy()).long()
            )
            for name, part in zip(SPLITS, parts, strict=True)
        }
    pairs = pd.read_json(hh_file, lines=True).sample(frac=1, random_state=0)
    if len(pairs) < sum(sizes) // 2:
        raise ValueError(f"`hh_file` has {len(pairs)} pairs, the splits need {sum(sizes) // 2}. Ask for fewer.")
    ends = np.cumsum([0, *(size // 2 for size in sizes)])
    return {
        name: Split(
            [text for pair in zip(part["chosen"], part["rejected"], strict=True) for text in pair],
            torch.zeros(0, dtype=torch.long),
        )
        for name, part in zip(SPLITS, (pairs[a:b] for a, b in itertools.pairwise(ends)), strict=True)
    }


class Encoder:
    """
    The frozen part of a BERT-like sentence encoder.

    Args:
        model_name_or_path (`str`):
            Sentence encoder whose states are averaged over the tokens.
        max_length (`int`):
            Tokens of a text.
        from_end (`bool`):
            Whether they are its last ones, or its first.
    """

    def __init__(self, model_name_or_path: str, max_length: int, from_end: bool):
        side = "left" if from_end else "right"
        self.tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, truncation_side=side)
        self.model = AutoModel.from_pretrained(model_name_or_path, dtype=torch.float32).eval()
        self.max_length = max_length

    def last_layer(self) -> nn.Module:
        """A copy of the last layer, to be trained."""
        return copy.deepcopy(self.model.encoder.layer[-1])

    @torch.no_grad()
    def features(self, texts: list[str]) -> torch.Tensor:
        """Mean states of the texts, `(N, H)`, float32; texts of like length share a batch."""
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        order = sorted(range(len(texts)), key=lambda row: -len(encoded[row]))
        states = torch.empty(len(texts), self.model.config.hidden_size)
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            batch = self.tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt")
            states[rows] = pooled_states(self.model(**batch), "mean", batch["input_ids"], batch["attention_mask"])
        return states

    @torch.no_grad()
    def states_before_last_layer(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States that the last layer reads, `(N, T, H)`, and the mask of tokens `(N, T)`."""
        batch = self.tokenizer(
            texts, truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt"
        )
        parts = [
            self.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
            for ids, mask in zip(batch["input_ids"].split(64), batch["attention_mask"].split(64), strict=True)
        ]
        return torch.cat(parts), batch["attention_mask"]


def mean_state(layer: nn.Module, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens, `(N, H)`, of a layer's states from those before it `(N, T, H)`."""
    bias = torch.zeros(mask.shape, dtype=states.dtype).masked_fill(mask == 0, torch.finfo(states.dtype).min)
    output = layer(states, attention_mask=bias[:, None, None])
    hidden = output[0] if isinstance(output, tuple) else output
    weights = mask.to(hidden).unsqueeze(-1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
