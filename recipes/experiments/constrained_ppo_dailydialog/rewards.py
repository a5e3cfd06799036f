"""The rewards of the paper's dialogue experiment (section 3), each for one reply at a time."""

import os
from functools import cache
from typing import Any

from .daily_dialog import clean
from .intent import IntentClassifier


CLASSIFIER_VARIABLE = "TRL_EXT_INTENT_CLASSIFIER"


class _NoSynonyms:
    """In place of WordNet, whose data nltk does not ship: words match by form and by stem only."""

    def synsets(self, word: str) -> list[Any]:
        return []


def meteor(
    completions: list[Any], reference: list[str], prompts: list[Any] | None = None, **columns: Any
) -> list[float]:
    """
    METEOR of each reply against its reference, by nltk with matches of word and stem, without WordNet's synonyms.

    The official code gives the k-th reply the score of the first k replies together; here each has its own.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Plain or conversational completions.
        reference (`list[str]`):
            Reference of each completion.
        prompts (`list`, *optional*):
            Not used.
        columns (`Any`):
            Not used.

    Returns:
        `list[float]` in `[0, 1]`.
    """
    from nltk.translate.meteor_score import meteor_score

    synonyms = _NoSynonyms()
    return [
        float(meteor_score([wanted.split()], clean(_text(completion)).split(), wordnet=synonyms))
        for completion, wanted in zip(completions, reference, strict=True)
    ]


def intent_match(
    completions: list[Any],
    last: list[str],
    intent: list[int],
    prompts: list[Any] | None = None,
    **columns: Any,
) -> list[float]:
    """
    Whether the predicted dialogue act of each reply is that of the reference.

    The classifier is the folder named by the environment variable `TRL_EXT_INTENT_CLASSIFIER`, which a recipe sets
    under `env`.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Plain or conversational completions.
        last (`list[str]`):
            Utterance before each completion.
        intent (`list[int]`):
            Dialogue act of each reference.
        prompts (`list`, *optional*):
            Not used.
        columns (`Any`):
            Not used.

    Returns:
        `list[float]` of 0 and 1.

    Raises:
        ValueError: If the variable is not set.
    """
    folder = os.environ.get(CLASSIFIER_VARIABLE)
    if not folder:
        raise ValueError(
            f"`{CLASSIFIER_VARIABLE}` is not set. Name the folder of the intent classifier, in a recipe under `env`."
        )
    replies = [clean(_text(completion)) for completion in completions]
    predicted = _classifier(folder).predict(last, replies)
    return [float(a == b) for a, b in zip(predicted, intent, strict=True)]


@cache
def _classifier(folder: str) -> IntentClassifier:
    return IntentClassifier.load(folder)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else " ".join(message["content"] for message in completion)
