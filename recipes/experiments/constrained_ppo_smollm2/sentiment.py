"""Two classifiers of sentiment that share nothing: one whose score is trained on, and one that judges."""

import re
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline


PROXY_FILE, GOLD_FILE = "proxy.joblib", "gold.joblib"
# Words of the pieces that the judge learns from and both are tested on, as many as prompt and continuation have
PIECE_WORDS = 30
# Test reviews that the accuracies are measured on
NUM_TEST = 4000


def clean(text: str) -> str:
    """A review without line breaks and repeated blanks."""
    return " ".join(text.replace("<br />", " ").split())


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"[a-z']+", text.lower())


def halves(imdb_dir: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The training reviews in two halves without a common review, each with as many of both labels."""
    reviews = pd.read_parquet(Path(imdb_dir) / "imdb_train.parquet").sample(frac=1, random_state=0)
    order = reviews.groupby("label").cumcount()
    return reviews[order % 2 == 0], reviews[order % 2 == 1]


def pieces(reviews: pd.DataFrame, size: int, seed: int) -> tuple[list[str], np.ndarray]:
    """One piece of `size` words from a random place of each review, and the review's label."""
    generator = np.random.default_rng(seed)
    texts = []
    for text in reviews["text"]:
        words = clean(text).split()
        start = generator.integers(max(1, len(words) - size + 1))
        texts.append(" ".join(words[start : start + size]))
    return texts, reviews["label"].to_numpy()


def train_proxy(reviews: pd.DataFrame, least_count: int = 20) -> Pipeline:
    """Logistic regression on the words of whole reviews: each word adds its weight as often as it stands there."""
    vectorizer = CountVectorizer(analyzer=words_of, min_df=least_count)
    classifier = make_pipeline(vectorizer, LogisticRegression(C=0.02, solver="liblinear"))
    return classifier.fit(reviews["text"].map(clean), reviews["label"])


def train_gold(reviews: pd.DataFrame, num_rounds: int = 3) -> Pipeline:
    """Logistic regression on parts of words, two to five letters, of pieces as short as what it judges."""
    drawn = [pieces(reviews, PIECE_WORDS, seed) for seed in range(num_rounds)]
    vectorizer = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), n_features=2**19, alternate_sign=False)
    classifier = make_pipeline(vectorizer, LogisticRegression(C=10.0, solver="liblinear"))
    return classifier.fit([text for texts, _ in drawn for text in texts], np.concatenate([own for _, own in drawn]))


def prepare(imdb_dir: str | Path, folder: Path) -> dict[str, float]:
    """
    Trains both, once, and keeps them in the folder.

    Args:
        imdb_dir (`str` or `Path`):
            Folder of `imdb_train.parquet` and `imdb_test.parquet` (columns `text`, `label`).
        folder (`Path`):
            Folder of the experiment.

    Returns:
        `dict[str, float]`: accuracy of each on pieces of test reviews, and on how many they agree.
    """
    if not (folder / GOLD_FILE).is_file():
        own, others = halves(imdb_dir)
        joblib.dump(train_proxy(own), folder / PROXY_FILE)
        joblib.dump(train_gold(others), folder / GOLD_FILE)
    proxy, gold = (joblib.load(folder / name) for name in (PROXY_FILE, GOLD_FILE))
    test = pd.read_parquet(Path(imdb_dir) / "imdb_test.parquet")
    test = test.sample(min(NUM_TEST, len(test)), random_state=0)
    texts, labels = pieces(test, PIECE_WORDS, seed=0)
    answers = {name: classifier.predict(texts) for name, classifier in (("proxy", proxy), ("gold", gold))}
    accuracies = {name: float(np.mean(answer == labels)) for name, answer in answers.items()}
    return {**accuracies, "agreement": float(np.mean(answers["proxy"] == answers["gold"]))}


class SentimentScore:
    """
    The first proxy: log-odds of positive sentiment of each completion by the bag of words, without bound.

    Args:
        folder (`Path`):
            Folder of the experiment.
    """

    __name__ = "sentiment_score"

    def __init__(self, folder: Path):
        self.classifier = joblib.load(folder / PROXY_FILE)

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return self.classifier.decision_function(completions).tolist()


def distinct_share(completions: list[str], **columns: Any) -> list[float]:
    """The second proxy: share of the words of each completion that are not repetitions; 0 without words."""
    found = [words_of(completion) for completion in completions]
    return [len(set(words)) / len(words) if words else 0.0 for words in found]
