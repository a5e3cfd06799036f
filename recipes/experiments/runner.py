"""What the experiments share: runs kept as they end, so that an interrupted experiment goes on, and tables."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class FinishedRuns:
    """
    The finished runs of an experiment: `rows`, and each a line of `runs.jsonl`.

    Args:
        folder (`str` or `Path`):
            Folder of the experiment; it is made where it is missing.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "runs.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, **setting: Any) -> bool:
        """Whether a run with these entries is among the finished ones."""
        return any(setting.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a run that has just ended."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rewrite(self) -> None:
        """Writes all rows anew, after what they hold has changed."""
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """
    A Markdown table.

    Args:
        columns (`Sequence[str]`):
            Headings.
        rows (`Iterable[Sequence[str]]`):
            Cells of each row.

    Returns:
        `str`
    """
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
