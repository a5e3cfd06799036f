"""Which dialogue act an utterance is: a bag-of-words classifier, or one from the hub."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .daily_dialog import INTENTS, Dialogue


CLASSIFIER_FILE = "intent_classifier.json"


class IntentClassifier:
    """
    Logistic regression on the words and word pairs of an utterance and of the one before it.

    Args:
        vocabulary (`list[str]`):
            Features.
        weights (`np.ndarray` of shape `(F + 1, 4)`):
            Weight of each feature for each intent, the intercepts last.
    """

    def __init__(self, vocabulary: list[str], weights: np.ndarray):
        self.index = {feature: position for position, feature in enumerate(vocabulary)}
        self.weights = weights

    def predict(self, last: Sequence[str], replies: Sequence[str]) -> list[int]:
        """The intent of each reply to the utterance before it, an index of `INTENTS`."""
        return [int(np.argmax(self._scores(before, reply))) for before, reply in zip(last, replies, strict=True)]

    def _scores(self, last: str, reply: str) -> np.ndarray:
        found = [self.index[feature] for feature in features(last, reply) if feature in self.index]
        return self.weights[-1] + self.weights[found].sum(axis=0)

    def save(self, folder: str | Path) -> None:
        """Writes the classifier to `intent_classifier.json` in a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = {"intents": INTENTS, "vocabulary": list(self.index), "weights": self.weights.round(4).tolist()}
        (Path(folder) / CLASSIFIER_FILE).write_text(json.dumps(content))

    @classmethod
    def load(cls, folder: str | Path) -> "IntentClassifier":
        """
        Reads a saved classifier.

        Raises:
            FileNotFoundError: If the folder has none.
        """
        path = Path(folder) / CLASSIFIER_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {CLASSIFIER_FILE}. Make it with "
                "`python -m recipes.experiments.constrained_ppo_dailydialog.prepare`."
            )
        content = json.loads(path.read_text())
        return cls(content["vocabulary"], np.array(content["weights"]))


def features(last: str, reply: str) -> set[str]:
    """Words and neighbouring pairs of the reply with its ends marked, and the words of the utterance before it."""
    words = ["<", *reply.lower().split(), ">"]
    pairs = (f"{a} {b}" for a, b in itertools.pairwise(words))
    return {*words, *pairs, *(f"before: {word}" for word in last.lower().split())}


def train_intent_classifier(
    dialogues: Sequence[Dialogue], held_out: Sequence[Dialogue], least_count: int = 3, inverse_penalty: float = 0.1
) -> tuple[IntentClassifier, dict[str, float]]:
    """
    Trains the classifier on features of at least `least_count` utterances, with an L2 penalty; returns it, and its
    `accuracy` on the held-out replies beside that of the most frequent intent, `majority`.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    examples, labels = _examples(dialogues)
    vectorizer = CountVectorizer(analyzer=_identity, min_df=least_count, binary=True)
    counts = vectorizer.fit_transform([sorted(features(*example)) for example in examples])
    fitted = LogisticRegression(C=inverse_penalty, max_iter=200).fit(counts, labels)
    weights = np.zeros((counts.shape[1] + 1, len(INTENTS)))
    weights[:-1, fitted.classes_], weights[-1, fitted.classes_] = fitted.coef_.T, fitted.intercept_
    classifier = IntentClassifier(vectorizer.get_feature_names_out().tolist(), weights)
    test_examples, test_labels = _examples(held_out)
    predicted = classifier.predict(*zip(*test_examples, strict=True))
    majority = np.bincount(labels).argmax()
    return classifier, {
        "accuracy": float(np.mean(np.array(predicted) == test_labels)),
        "majority": float(np.mean(np.array(test_labels) == majority)),
    }


def _identity(tokens: Any) -> Any:
    return tokens


def _examples(dialogues: Sequence[Dialogue]) -> tuple[list[tuple[str, str]], list[int]]:
    pairs, labels = [], []
    for dialogue in dialogues:
        for turn in range(1, len(dialogue.utterances)):
            pairs.append((dialogue.utterances[turn - 1], dialogue.utterances[turn]))
            labels.append(dialogue.intents[turn])
    return pairs, labels
