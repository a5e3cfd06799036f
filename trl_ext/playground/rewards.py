"""Exact scores of playground text, as TRL reward functions."""

from typing import Any

from .grammar import NEGATORS, SENTIMENT, is_sentence, word_sentiments
from .tokenizer import split_words


def token_truth(text: str) -> list[float]:
    """
    Signed sentiment of each token of a text, 0 for neutral ones ([`word_sentiments`]).

    Args:
        text (`str`):
            Any text.

    Returns:
        `list[float]`, aligned with the playground tokenizer's tokens of the text, special tokens left out.
    """
    return word_sentiments(split_words(text))


def sentiment(text: str) -> float:
    """
    `S / (A + 2)` with `S` the sum of the signed sentiments and `A` the sum of their absolute values, negators left
    out: in `(-1, 1)`, 0 for neutral text, and growing with the number of agreeing words.

    Args:
        text (`str`):
            Any text.

    Returns:
        `float`
    """
    words = split_words(text)
    values = [value for word, value in zip(words, word_sentiments(words), strict=True) if word in SENTIMENT]
    return sum(values) / (sum(map(abs, values)) + 2.0)


def sentiment_reward(completions: list[Any], prompts: list[Any] | None = None, **columns: Any) -> list[float]:
    """
    The gold reward of the playground: [`sentiment`] of each completion.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Plain or conversational completions.
        prompts (`list`, *optional*):
            Not used.
        columns (`Any`):
            Not used.

    Returns:
        `list[float]` in `(-1, 1)`.
    """
    return [sentiment(_text(completion)) for completion in completions]


def grammaticality(completions: list[Any], prompts: list[Any] | None = None, **columns: Any) -> list[float]:
    """
    Share of the sentences of each completion that the grammar accepts; an unfinished end counts as a sentence.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Plain or conversational completions.
        prompts (`list`, *optional*):
            Not used.
        columns (`Any`):
            Not used.

    Returns:
        `list[float]` in `[0, 1]`; 0 for an empty completion.
    """
    return [_share_of_sentences(_text(completion)) for completion in completions]


def count_positive_words(completions: list[Any], prompts: list[Any] | None = None, **columns: Any) -> list[float]:
    """
    A proxy that can be hacked: the number of positive words, whether negated or not.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Plain or conversational completions.
        prompts (`list`, *optional*):
            Not used.
        columns (`Any`):
            Not used.

    Returns:
        `list[float]`, not negative.
    """
    return [
        float(sum(SENTIMENT.get(word, 0.0) > 0 and word not in NEGATORS for word in split_words(_text(completion))))
        for completion in completions
    ]


def _share_of_sentences(text: str) -> float:
    words = split_words(text)
    sentences, current = [], []
    for word in words:
        current.append(word)
        if word == ".":
            sentences.append(current)
            current = []
    if current:
        sentences.append(current)
    if not sentences:
        return 0.0
    return sum(is_sentence(" ".join(sentence)) for sentence in sentences) / len(sentences)


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    return " ".join(message["content"] for message in completion)
