"""A small world where the truth is known: reviews from a grammar, whose sentiment, sentiment-bearing tokens and
grammaticality are exact, with a tokenizer, a base model trained on them, preference pairs and rewards.

It is the default data of the demo and of many tests, and needs no hub.
"""

from .base_model import BaseModelSettings, base_model_path
from .grammar import generate_review, vocabulary, word_sentiments
from .preferences import load_playground_dataset, preference_dataset, prompts
from .rewards import (
    count_positive_words,
    grammaticality,
    playground_gold,
    positive_word_share,
    reference_similarity,
    sentiment,
    sentiment_reward,
    token_truth,
)
from .tokenizer import build_tokenizer


# Name in a recipe: settings of the base model
MODELS = {"playground": BaseModelSettings(), "playground-small": BaseModelSettings.of_one_mind()}
__all__ = [
    "MODELS",
    "BaseModelSettings",
    "base_model_path",
    "build_tokenizer",
    "count_positive_words",
    "generate_review",
    "grammaticality",
    "load_playground_dataset",
    "playground_gold",
    "positive_word_share",
    "preference_dataset",
    "prompts",
    "reference_similarity",
    "resolve",
    "sentiment",
    "sentiment_reward",
    "token_truth",
    "vocabulary",
    "word_sentiments",
]


def resolve(name: str) -> str:
    """
    Turns the name of a base model into its folder; it is trained on the first call.

    Args:
        name (`str`):
            `"playground"`, or `"playground-small"`, which is [`BaseModelSettings.of_one_mind`].

    Returns:
        `str`

    Raises:
        ValueError: If the name is another.
    """
    if name not in MODELS:
        names = ", ".join(map(repr, MODELS))
        raise ValueError(f"`model_name_or_path: {name}` is no playground model. Give one of {names}.")
    return str(base_model_path(settings=MODELS[name]))
