"""Preference pairs from labelled film reviews: a positive and a negative one that open with the same words."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from hashlib import sha256
from math import log
from typing import Any


OPENING_WORDS = 3
CONTINUATION_WORDS = 20
NUM_PAIRS = 1000
# Reviews that a word must occur in to say anything
MIN_REVIEWS = 50


def review_pairs(reviews: Any) -> Any:
    """
    The `NUM_PAIRS` clearest pairs of reviews that share their first words, each beginning in one pair at most.

    A pair is the clearer, the more its two continuations differ in the sum of their words' log-odds in all reviews
    ([`word_log_odds`]). The order of the reviews does not matter.

    Args:
        reviews (`~datasets.Dataset`):
            Rows with `text` and `label`, 1 for a positive review and 0 for a negative one.

    Returns:
        `~datasets.Dataset`: `prompt`, the `OPENING_WORDS` that both open with; `chosen` and `rejected`, the
        `CONTINUATION_WORDS` that follow in the positive and in the negative review.
    """
    from datasets import Dataset

    texts = [text.replace("<br />", " ") for text in reviews["text"]]
    labels = list(reviews["label"])
    log_odds = word_log_odds(texts, labels)
    by_opening: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for text, label in zip(texts, labels, strict=True):
        words = text.split()[: OPENING_WORDS + CONTINUATION_WORDS]
        if len(words) == OPENING_WORDS + CONTINUATION_WORDS and label in (0, 1):
            by_opening[" ".join(words[:OPENING_WORDS])][label].add(" " + " ".join(words[OPENING_WORDS:]))

    def clearness(text: str) -> float:
        return round(sum(log_odds.get(word, 0.0) for word in sorted(_words(text))), 9)

    found = []
    for opening, (negative, positive) in by_opening.items():
        # Reviews of both labels may begin alike, with a summary of the plot for example
        best = sorted(positive - negative, key=lambda text: (-clearness(text), text))
        worst = sorted(negative - positive, key=lambda text: (clearness(text), text))
        for chosen, rejected in zip(best, worst, strict=False):
            row = {"prompt": opening, "chosen": chosen, "rejected": rejected}
            found.append((clearness(rejected) - clearness(chosen), _digest(row), row))
    rows = [row for *_, row in sorted(found, key=lambda entry: entry[:2])[:NUM_PAIRS]]
    return Dataset.from_list(sorted(rows, key=_digest))


def word_log_odds(texts: Iterable[str], labels: Iterable[int]) -> dict[str, float]:
    """
    How much more often each word occurs in positive than in negative reviews, as naive Bayes takes it,
    `log((n_+ + 1) / (N_+ + 2)) - log((n_- + 1) / (N_- + 2))` of a word in `n_+` of `N_+` positive
    and `n_-` of `N_-` negative reviews.

    Args:
        texts (`Iterable[str]`):
            Reviews.
        labels (`Iterable[int]`):
            1 for a positive and 0 for a negative one; the others are not counted.

    Returns:
        `dict[str, float]`: the words of at least `MIN_REVIEWS` reviews.
    """
    words: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    number = [0, 0]
    for text, label in zip(texts, labels, strict=True):
        if label in (0, 1):
            words[label].update(_words(text))
            number[label] += 1
    return {
        word: log((words[1][word] + 1) / (number[1] + 2)) - log((words[0][word] + 1) / (number[0] + 2))
        for word in words[0].keys() | words[1].keys()
        if words[0][word] + words[1][word] >= MIN_REVIEWS
    }


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


def _digest(row: dict[str, str]) -> str:
    return sha256("".join(row.values()).encode()).hexdigest()
