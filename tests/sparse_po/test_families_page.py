"""docs/model_families.md is what its generator makes of what was measured, and nothing in it went wrong."""

import json
from pathlib import Path

import pytest

import trl_ext
from tests.sparse_po.families_page import COLUMNS, LEFT_OUT, RESULTS, TOLERANCE, render


PAGE = Path(trl_ext.__file__).parents[1] / "docs" / "model_families.md"
COMMITTED = json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_page_is_the_generators():
    assert PAGE.read_text(encoding="utf-8") == render(COMMITTED)
    assert len(COMMITTED["families"]) >= 60
    left_out = {name for names in LEFT_OUT.values() for name in names.split()}
    for name, row in COMMITTED["families"].items():
        assert list(row["cells"]) == list(COLUMNS), name
        assert name not in left_out


@pytest.mark.parametrize("family", COMMITTED["families"])
def test_every_cell_holds_or_is_refused(family):
    for column, cell in COMMITTED["families"][family]["cells"].items():
        if cell["state"] == "refused":
            assert cell["error"]
        else:
            assert cell["state"] == "holds", (column, cell)
            found = cell["differences"]
            bounds = TOLERANCE if column not in ("reload", "resume") else dict.fromkeys(found, 0.0)
            assert all(found[name] <= bounds[name] for name in found), (column, cell)


def test_a_page_changed_by_hand_is_seen():
    changed = json.loads(json.dumps(COMMITTED))
    row = next(iter(changed["families"].values()))
    row["cells"]["learned"] = {"state": "differs", "differences": dict.fromkeys(TOLERANCE, 0.5)}
    assert "**differs**, 5e-01" in render(changed) != PAGE.read_text(encoding="utf-8")
