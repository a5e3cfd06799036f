"""
Data of the Hub that a recipe wants in another form than it is published in.

trl-ext data hh-prompts --output data/hh_prompts.json
trl-ext data imdb-pairs --output data/imdb_pairs.jsonl --data_files imdb_train.parquet
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .recipe.overrides import reader_of
from .review_pairs import review_pairs


_LAST_TURN = "\n\nAssistant:"
Row = dict[str, Any]


def hh_prompt(row: Row) -> Row:
    """
    The dialogue of a pair of Anthropic's HH up to its last turn.

    Args:
        row (`dict[str, Any]`):
            Row with whole dialogues, `chosen` and `rejected`.

    Returns:
        `dict[str, str]`: `prompt`, which ends with the name of who speaks next; empty where there is no such turn.
    """
    return {"prompt": _split(row["chosen"])[0]}


def hh_pair(row: Row) -> Row:
    """
    A pair of Anthropic's HH as prompt and two answers.

    Args:
        row (`dict[str, Any]`):
            Row with whole dialogues, `chosen` and `rejected`.

    Returns:
        `dict[str, str]`: `prompt`, `chosen` and `rejected`; an empty prompt where the two dialogues differ before the
        last turn, so that they have none in common.
    """
    (prompt, chosen), (other, rejected) = _split(row["chosen"]), _split(row["rejected"])
    return {"prompt": prompt if prompt == other else "", "chosen": chosen, "rejected": rejected}


def _split(dialogue: str) -> tuple[str, str]:
    before, turn, answer = dialogue.rpartition(_LAST_TURN)
    return before + turn, answer


def _by_row(form: Callable[[Row], Row], dataset: Any) -> Any:
    """A data set whose rows are given another form each; those whose prompt is empty are left out."""
    found = dataset.map(form, remove_columns=dataset.column_names)
    return found.filter(lambda row: bool(row["prompt"]))


class Recast(NamedTuple):
    """
    One form of a data set.

    Args:
        source (`str`):
            Id on the Hub.
        split (`str`):
            Split of it.
        written (`Callable`):
            From the [`~datasets.Dataset`] to the one that is written.
        wanted_by (`tuple[str, ...]`):
            Recipes that read it.
    """

    source: str
    split: str
    written: Callable[[Any], Any]
    wanted_by: tuple[str, ...]


_HH = ("Anthropic/hh-rlhf", "train")
RECASTS = {
    "hh-prompts": Recast(*_HH, partial(_by_row, hh_prompt), ("constrained_ppo/helpful_harmless",)),
    "hh-pairs": Recast(*_HH, partial(_by_row, hh_pair), ("sparse_po/hh_pythia_1.4b",)),
    "imdb-pairs": Recast(
        "stanfordnlp/imdb",
        "train",
        review_pairs,
        ("sparse_po/smollm2_135m", "equilibrium/smollm2_reward", "constrained_ppo/grpo_smollm2"),
    ),
}


def recast(dataset: Any, name: str, path: Path) -> int:
    """
    Writes a data set in another form.

    Args:
        dataset (`~datasets.Dataset`):
            The data set.
        name (`str`):
            Name in `RECASTS`.
        path (`Path`):
            File of JSON lines.

    Returns:
        `int`: number of rows written.
    """
    written = RECASTS[name].written(dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    written.to_json(str(path))
    return len(written)


def make_parser(prog: str = "trl-ext data") -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    forms = "; ".join(f"{name}: {one.source} for {', '.join(one.wanted_by)}" for name, one in RECASTS.items())
    parser = argparse.ArgumentParser(prog=prog, description=f"Writes data of the Hub as a recipe wants it ({forms}).")
    parser.add_argument("name", choices=sorted(RECASTS), help="Form of the data.")
    parser.add_argument("--output", type=Path, required=True, help="File of JSON lines to write.")
    parser.add_argument("--data_files", help="The data set's rows in a file of one's own, read in place of the Hub.")
    return parser


def main(arguments: list[str]) -> int:
    """
    Runs the command.

    Args:
        arguments (`list[str]`):
            Arguments.

    Returns:
        `int`: 0.

    Raises:
        FileExistsError: If the file is there already.
        RecipeError: If `--data_files` has an ending that is not known.
    """
    args = make_parser().parse_args(arguments)
    if args.output.exists():
        raise FileExistsError(f"{args.output} is there already. Name another file, or move it away.")
    from datasets import load_dataset

    form = RECASTS[args.name]
    if args.data_files:
        dataset = load_dataset(reader_of(args.data_files), data_files=args.data_files, split="train")
    else:
        dataset = load_dataset(form.source, split=form.split)
    count = recast(dataset, args.name, args.output)
    print(f"{count:,} rows of {args.data_files or form.source} written to {args.output}.")  # noqa: T201
    return 0
