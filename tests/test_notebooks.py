"""The notebooks of the documentation run, cell by cell, and say what they say."""

import json
import math
from pathlib import Path

import pytest

import trl_ext


FOLDER = Path(trl_ext.__file__).parents[1] / "docs" / "notebooks"


def run(name):
    """Runs a notebook's cells; what they leave."""
    cells = [cell for cell in json.loads((FOLDER / name).read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names = {}
    for position, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{name}, cell {position}", "exec"), names)
    return names


def test_every_notebook_is_run():
    assert {path.name for path in FOLDER.iterdir()} == {"sparse_po.ipynb", "multipliers.ipynb"}


def test_sparse_po():
    found = run("sparse_po.ipynb")
    first, *_, last = found["history"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and first["kl/chosen"] == pytest.approx(0, abs=1e-5)
    assert last["kl/chosen"] > 0 and all(0.3 < entry["mask/reward/mean"] < 3 for entry in found["history"])
    assert len(found["weighted"]) > 10


def test_multipliers():
    found = run("multipliers.ipynb")
    integral, default = found["found"]["integral alone"], found["found"]["default"]
    assert default["reached"] < 0.5 * integral["reached"]
    for ended in (integral, default):
        assert ended["mean"] == pytest.approx(found["THRESHOLD"], abs=0.05)
    assert integral["weight"] == pytest.approx(found["low"], rel=0.25)
