"""What the demo trains first: its base models, each on a core of its own."""

from collections.abc import Sequence
from pathlib import Path

from .work import Part, Task


def base_models_part(output_dir: Path, names: Sequence[str]) -> Part:
    """
    Trains the playground's base models, or finds them where they were trained before.

    Args:
        output_dir (`Path`):
            Folder of the logs.
        names (`Sequence[str]`):
            Names of base models of the playground.

    Returns:
        [`Part`], which prints and draws nothing.
    """
    from ..playground import resolve

    return Part(
        "Base models",
        [Task(name, output_dir / f"base_model_{name}.log", resolve, (name,)) for name in names],
        lambda folders: folders,
    )
