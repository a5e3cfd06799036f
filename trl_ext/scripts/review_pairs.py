"""Preference pairs from labelled film reviews: a positive and a negative one that open with the same words."""

from collections import defaultdict
from hashlib import sha256
from typing import Any


OPENING_WORDS = 3
CONTINUATION_WORDS = 20


def review_pairs(reviews: Any) -> Any:
    """
    Pairs of reviews that share their first words, each review in one pair at most.

    The order of the reviews does not matter: pairs and their order follow from the texts alone, by their hashes.

    Args:
        reviews (`~datasets.Dataset`):
            Rows with `text` and `label`, 1 for a positive review and 0 for a negative one.

    Returns:
        `~datasets.Dataset`: `prompt`, the `OPENING_WORDS` that both open with; `chosen` and `rejected`, the
        `CONTINUATION_WORDS` that follow in the positive and in the negative review.
    """
    from datasets import Dataset

    by_opening: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for text, label in zip(reviews["text"], reviews["label"], strict=True):
        words = text.replace("<br />", " ").split()[: OPENING_WORDS + CONTINUATION_WORDS]
        if len(words) == OPENING_WORDS + CONTINUATION_WORDS and label in (0, 1):
            opening, rest = words[:OPENING_WORDS], words[OPENING_WORDS:]
            by_opening[" ".join(opening)][label].add(" " + " ".join(rest))
    rows = [
        {"prompt": opening, "chosen": chosen, "rejected": rejected}
        for opening, (negative, positive) in by_opening.items()
        # Reviews of both labels may begin alike, with a summary of the plot for example
        for chosen, rejected in zip(_shuffled(positive - negative), _shuffled(negative - positive), strict=False)
    ]
    return Dataset.from_list(sorted(rows, key=lambda row: _digest("".join(row.values()))))


def _shuffled(texts: set[str]) -> list[str]:
    return sorted(texts, key=_digest)


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()
