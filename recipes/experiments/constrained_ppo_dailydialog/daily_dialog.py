"""DailyDialog (https://aclanthology.org/I17-1099) in the form of XDailyDialog: utterances with their dialogue acts."""

import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset


logger = logging.getLogger(__name__)
INTENTS = ("inform", "question", "directive", "commissive")
END = "</s>"
_QUOTES = str.maketrans(
    {"’": "'", "‘": "'", "`": "'", "“": '"', "”": '"', "…": ".", "—": "-", "–": "-", "、": ","}  # noqa: RUF001
)


@dataclass(frozen=True)
class Dialogue:
    """
    A dialogue.

    Args:
        utterances (`tuple[str, ...]`):
            What is said, in turns, lower-case, words and signs apart.
        intents (`tuple[int, ...]`):
            Dialogue act of each utterance, an index of `INTENTS`.
    """

    utterances: tuple[str, ...]
    intents: tuple[int, ...]


def read_dialogues(folder: str | Path) -> list[Dialogue]:
    """
    Reads every dialogue of a folder, each once.

    Args:
        folder (`str` or `Path`):
            Folder with `*_human.txt` (tab-separated: utterances that end in `__eou__`, topic, dialogue acts, emotions)
            and, optionally, pairs `*_text_en.txt` and `*_action.txt`.

    Returns:
        `list[Dialogue]`

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If no dialogue has one act for each utterance; single ones are left out with a warning.
    """
    folder = Path(folder)
    found: dict[tuple[str, ...], Dialogue] = {}
    lines: list[tuple[str, str]] = []
    for path in sorted(folder.glob("*_human.txt")):
        columns = [line.split("\t") for line in path.read_text().splitlines()]
        lines += [(column[0], column[2]) for column in columns]
    for path in sorted(folder.glob("*_text_en.txt")):
        acts = path.with_name(path.name.replace("_text_en", "_action")).read_text().splitlines()
        lines += zip(path.read_text().splitlines(), acts, strict=True)
    if not lines:
        raise FileNotFoundError(
            f"{folder} has no `*_human.txt` and no `*_text_en.txt`. Give the folder of XDailyDialog's English files."
        )
    misaligned = 0
    for text, given in lines:
        utterances = tuple(clean(utterance) for utterance in text.split("__eou__") if utterance.strip())
        intents = tuple(int(act) - 1 for act in given.split())
        if len(utterances) == len(intents) and set(intents) <= set(range(len(INTENTS))):
            found.setdefault(utterances, Dialogue(utterances, intents))
        else:
            misaligned += 1
    if misaligned:
        logger.warning(f"{misaligned} dialogues of {folder} without one dialogue act for each utterance are left out.")
    if not found:
        raise ValueError(f"No dialogue of {folder} has one dialogue act from 1 to 4 for each utterance.")
    return list(found.values())


def clean(utterance: str) -> str:
    """Lower-case text with plain quotes, words and signs apart, contractions together."""
    text = utterance.lower().translate(_QUOTES)
    text = re.sub(r"\s*'\s*(s|t|m|d|re|ve|ll)\b", r"'\1", text)
    return " ".join(re.findall(r"\w+(?:'\w+)?|[^\w\s]", text))


def split_dialogues(
    dialogues: Sequence[Dialogue], held_out: float = 0.1, seed: int = 0
) -> tuple[list[Dialogue], list[Dialogue], list[Dialogue]]:
    """
    Training, validation and test dialogues; the utterances of a dialogue stay together.

    Args:
        dialogues (`Sequence[Dialogue]`):
            Dialogues.
        held_out (`float`, *optional*, defaults to `0.1`):
            Share of each held-out split.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the shuffle.

    Returns:
        `tuple[list[Dialogue], list[Dialogue], list[Dialogue]]`
    """
    shuffled = list(dialogues)
    random.Random(seed).shuffle(shuffled)
    size = max(1, round(held_out * len(shuffled)))
    return shuffled[2 * size :], shuffled[:size], shuffled[size : 2 * size]


def replies(
    dialogues: Sequence[Dialogue],
    num_context: int = 5,
    num_words: int = 40,
    num_replies: int | None = None,
    seed: int = 0,
) -> Dataset:
    """
    One row for each utterance but the first of its dialogue. Replies to an utterance of more than `num_words` are left
    out.

    Args:
        dialogues (`Sequence[Dialogue]`):
            Dialogues.
        num_context (`int`, *optional*, defaults to `5`):
            Most utterances before the reply.
        num_words (`int`, *optional*, defaults to `40`):
            Most words of them together: the earliest are dropped first.
        num_replies (`int`, *optional*):
            Rows to draw. Defaults to all.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Returns:
        [`~datasets.Dataset`] with the columns `prompt` (the context, `</s>` after each utterance), `last` (its last
        utterance), `reference` and `intent` (of the reference).
    """
    rows = []
    for dialogue in dialogues:
        for turn in range(1, len(dialogue.utterances)):
            context = list(dialogue.utterances[max(0, turn - num_context) : turn])
            while sum(len(utterance.split()) for utterance in context) > num_words:
                context.pop(0)
            if context:
                reply = {"reference": dialogue.utterances[turn], "intent": dialogue.intents[turn]}
                rows.append({"prompt": "".join(text + END for text in context), "last": context[-1], **reply})
    random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows[:num_replies])
