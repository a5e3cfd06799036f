"""Reward models read no more tokens than they have positions for: what is longer loses its beginning.

TRL gives a reward model prompt and completion whole. A GPT-2 of 1,024 positions then fails in mid-run, at the first
longer text, on a GPU with an error that names neither.
"""

import logging
from typing import Any

import torch
from torch import nn


logger = logging.getLogger(__name__)


def positions_of(model: Any) -> int | None:
    """
    Number of tokens that a model can read.

    Args:
        model (`torch.nn.Module`):
            Model.

    Returns:
        `int` or `None`: `None` where its configuration states none.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        # RoBERTa and its kin count positions from behind the padding's
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1
    return positions if isinstance(positions, int) and positions > 0 else None


def keep_within_positions(model: nn.Module, name: str) -> None:
    """
    Lets a reward model see the last tokens of texts that are longer than its positions, and says of how many.

    Args:
        model (`torch.nn.Module`):
            Reward model whose inputs are padded on the right, or its engine.
        name (`str`):
            Its name in warnings.
    """
    inner: Any = getattr(model, "module", model)
    limit = positions_of(inner)
    if limit is not None and not getattr(inner, "_keeps_within_positions", False):
        inner._keeps_within_positions = True
        inner.register_forward_pre_hook(_Shortener(name, limit), with_kwargs=True)


class _Shortener:
    """The hook: counts texts, and those that it shortens."""

    def __init__(self, name: str, limit: int):
        self.name, self.limit = name, limit
        self.seen = self.shortened = 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        ids = kwargs.get("input_ids")
        if ids is None:
            return None
        self.seen += len(ids)
        if ids.shape[1] <= self.limit:
            return None
        mask = kwargs.get("attention_mask")
        lengths = torch.full_like(ids[:, 0], ids.shape[1]) if mask is None else mask.sum(dim=1)
        excess = (lengths - self.limit).clamp(min=0)
        self._say(int((excess > 0).sum()), int(lengths.max()))
        # The last tokens of each row, (B, limit)
        kept = excess[:, None] + torch.arange(self.limit, device=ids.device)
        rows = {
            key: value.gather(1, kept)
            for key, value in kwargs.items()
            if isinstance(value, torch.Tensor) and value.shape == ids.shape
        }
        return args, {**kwargs, **rows}

    def _say(self, count: int, longest: int) -> None:
        """Warns at the first text, and then whenever their number has grown tenfold."""
        before, self.shortened = self.shortened, self.shortened + count
        if count and (not before or len(str(before)) < len(str(self.shortened))):
            logger.warning(
                f"The reward model {self.name} has {self.limit:,} positions, and {self.shortened:,} of {self.seen:,} "
                f"texts so far were longer (here up to {longest:,} tokens): it read their last {self.limit:,}. "
                "Shorten prompts or `max_completion_length`, or take a reward model with more positions."
            )
