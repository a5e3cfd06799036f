"""The paper's evaluation score of dialogue (appendix A.2, (A.1)): likeness to the references and diversity."""

import string
from collections import Counter
from collections.abc import Mapping, Sequence

from .daily_dialog import clean


LIKENESS = ("sacrebleu", "rouge2", "bleu")
DIVERSITY = ("unique_3", "vocabulary_3", "longest")


def lexical_metrics(replies: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """
    The six measures of a set of replies.

    Args:
        replies (`Sequence[str]`):
            Replies.
        references (`Sequence[str]`):
            Reference of each.

    Returns:
        `dict[str, float]`: `sacrebleu` (sacreBLEU of the corpus, in [0, 1]), `rouge2` (mean ROUGE-2 F1), `bleu` (the
        corpus's BLEU-4 by nltk, without smoothing), and three counts over all replies, which compare between sets of
        one size only: `unique_3` (trigrams that occur once), `vocabulary_3` (different trigrams, punctuation left out)
        and `longest` (words of the longest reply, punctuation left out).

    Raises:
        ValueError: If there are no replies, or not one reference for each.
    """
    import sacrebleu
    from nltk.translate.bleu_score import corpus_bleu
    from rouge_score.rouge_scorer import RougeScorer

    if not replies or len(replies) != len(references):
        raise ValueError(
            f"`replies` and `references` must be of one length, not zero, got {len(replies)} and {len(references)}."
        )
    texts = [clean(reply) for reply in replies]
    scorer = RougeScorer(["rouge2"], use_stemmer=True)
    rouge = [scorer.score(wanted, text)["rouge2"].fmeasure for text, wanted in zip(texts, references, strict=True)]
    words = [text.split() for text in texts]
    return {
        "sacrebleu": sacrebleu.corpus_bleu(texts, [list(references)]).score / 100,
        "rouge2": sum(rouge) / len(rouge),
        "bleu": _unsmoothed(corpus_bleu, [[wanted.split()] for wanted in references], words),
        **_diversity(words),
    }


def _unsmoothed(corpus_bleu, references: list, words: list[list[str]]) -> float:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no 4-gram in common: the score is 0, or next to it
        return float(corpus_bleu(references, words))


def _diversity(words: Sequence[Sequence[str]]) -> dict[str, float]:
    without = [[word for word in reply if word not in string.punctuation] for reply in words]
    trigrams = Counter(gram for reply in words for gram in zip(reply, reply[1:], reply[2:], strict=False))
    vocabulary = {gram for reply in without for gram in zip(reply, reply[1:], reply[2:], strict=False)}
    return {
        "unique_3": float(sum(count == 1 for count in trigrams.values())),
        "vocabulary_3": float(len(vocabulary)),
        "longest": float(max(map(len, without))),
    }


def ranges_of(measured: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of each measure over evaluations, such as those of the runs on each reward alone."""
    return {
        name: (min(one[name] for one in measured), max(one[name] for one in measured))
        for name in (*LIKENESS, *DIVERSITY)
    }


def evaluation_score(measured: Mapping[str, float], ranges: Mapping[str, Sequence[float]]) -> float:
    """
    Equation (A.1): half the mean of the three measures of likeness and half that of the three of diversity, each
    min-max normalised.

    Args:
        measured (`Mapping[str, float]`):
            Measures of [`lexical_metrics`].
        ranges (`Mapping[str, Sequence[float]]`):
            Lowest and highest value of each.

    Returns:
        `float`: in [0, 1] within the ranges; not clipped.
    """
    scaled = {
        name: (measured[name] - low) / (high - low) if high > low else 0.0 for name, (low, high) in ranges.items()
    }
    return sum(sum(scaled[name] for name in group) / len(group) for group in (LIKENESS, DIVERSITY)) / 2
