"""Tables and pictures for TensorBoard, wandb and trackio, where `report_to` names them, beside a run's files."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import warn_of_failure
from .safe_text import for_markdown


# Reporters whose module logs to the run under way, each with the classes `Table` and `Image`
_MODULES = ("wandb", "trackio")


def is_last_log(logs: dict[str, Any] | None) -> bool:
    """Whether a log entry is the training's last: after it reporters close, before our callbacks' `on_train_end`."""
    return "train_runtime" in (logs or {})


def report_table(trainer: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    """
    Gives a table to every reporter of a trainer that takes tables. A failure is a warning.

    Args:
        trainer (`~transformers.Trainer`):
            Trainer; on processes other than the first nothing happens.
        name (`str`):
            What the table is called there.
        columns (`Sequence[str]`):
            Names of the columns.
        rows (`Sequence[Sequence]`):
            Rows, as long as `columns`.
        step (`int`):
            Step of the training.
    """

    def as_table(module: Any) -> Any:
        plain = [[cell if isinstance(cell, (int, float)) else str(cell) for cell in row] for row in rows]
        if module.__name__ == "wandb":
            return module.Table(columns=list(columns), data=plain)
        from pandas import DataFrame

        return module.Table(dataframe=DataFrame(plain, columns=list(columns)))

    _report(trainer, name, step, as_table, lambda writer: writer.add_text(name, markdown_table(columns, rows), step))


def report_image(trainer: Any, name: str, path: str | Path, step: int) -> None:
    """
    Gives a picture to every reporter of a trainer that takes pictures. A failure is a warning.

    Args:
        trainer (`~transformers.Trainer`):
            Trainer; on processes other than the first nothing happens.
        name (`str`):
            What the picture is called there.
        path (`str` or `Path`):
            PNG file.
        step (`int`):
            Step of the training.
    """

    def add(writer: Any) -> None:
        from matplotlib.image import imread

        writer.add_image(name, imread(path)[..., :3], step, dataformats="HWC")

    _report(trainer, name, step, lambda module: module.Image(str(path)), add)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as TensorBoard shows it in its text tab; numbers with four digits."""
    lines = [[f"{cell:.4g}" if isinstance(cell, float) else for_markdown(cell) for cell in row] for row in rows]
    head = [list(map(for_markdown, columns)), ["---"] * len(columns)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*head, *lines])


def _report(trainer: Any, name: str, step: int, convert: Callable[[Any], Any], add: Callable[[Any], None]) -> None:
    if not trainer.is_world_process_zero():
        return
    with warn_of_failure(f"{name} could not be reported"), _writers(trainer) as writers:
        for writer in writers:
            add(writer)
    for reporter in _MODULES:
        if reporter in trainer.args.report_to:
            with warn_of_failure(f"{name} could not be reported to {reporter}"):
                module = importlib.import_module(reporter)
                module.log({name: convert(module), "train/global_step": step})


@contextmanager
def _writers(trainer: Any) -> Iterator[list[Any]]:
    """The open writers of TensorBoard."""
    from transformers.integrations import TensorBoardCallback

    reporters = [one for one in trainer.callback_handler.callbacks if isinstance(one, TensorBoardCallback)]
    writers = [one.tb_writer for one in reporters if one.tb_writer is not None]
    yield writers
    for writer in writers:
        writer.flush()
