"""
Runs the notebooks of the documentation without Jupyter, and stores what their cells show.

python -m tests.notebooks
"""

import ast
import base64
import contextlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import trl_ext


FOLDER = Path(trl_ext.__file__).parents[1] / "docs" / "notebooks"


def outputs_of(source: str, name: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What a cell shows, in the form of a notebook: what it prints, and the value of its last line."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), names)
        value = eval(compile(ast.Expression(last.value), name, "eval"), names) if isinstance(last, ast.Expr) else None
    found: list[dict[str, Any]] = []
    if printed.getvalue():
        found.append({"name": "stdout", "output_type": "stream", "text": lines(printed.getvalue())})
    if value is not None:
        found.append({"data": shown(value), "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    return found


def shown(value: Any) -> dict[str, Any]:
    """A value as text, a figure as a picture too."""
    if not hasattr(value, "savefig"):
        return {"text/plain": lines(repr(value))}
    picture = io.BytesIO()
    value.savefig(picture, format="png", dpi=80)
    return {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]}


def lines(text: str) -> list[str]:
    """As notebooks keep text."""
    return text.splitlines(keepends=True)


def run(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Runs a notebook.

    Args:
        path (`Path`):
            Notebook.

    Returns:
        `tuple[dict, dict]`: the notebook with what its cells show, and what they leave.
    """
    notebook, names = json.loads(path.read_text()), {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    speaker = logging.getLogger("DeepSpeed")  # of the machine, at its first import, to the standard output
    speaker.addFilter(_nothing)
    try:
        for count, cell in enumerate(cells, 1):
            cell["outputs"] = outputs_of("".join(cell["source"]), f"{path.name}, cell {count}", names, count)
            cell["execution_count"] = count
    finally:
        speaker.removeFilter(_nothing)
    return notebook, names


def _nothing(_record: logging.LogRecord) -> bool:
    return False


def main() -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        path.write_text(json.dumps(run(path)[0], indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
