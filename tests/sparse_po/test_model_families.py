"""docs/model_families.md is what its generator makes, and what it says of a few families is measured again."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

import trl_ext
from tests.sparse_po import model_families
from tests.sparse_po.families import family_names
from tests.sparse_po.model_families import COLUMNS, RESULTS, Family, measure, render
from trl_ext.sparse_po import policy_forward


PAGE = Path(trl_ext.__file__).parents[1] / "docs" / "model_families.md"
COMMITTED = json.loads(RESULTS.read_text(encoding="utf-8"))
# Dense and tied; windows and a cap; experts with a loss of the router; a projection after the layers; a state space
FEW = ("gemma2", "mixtral, router loss", "opt-350m", "mamba")

pytestmark = pytest.mark.skipif(
    version("transformers") != COMMITTED["versions"]["transformers"], reason="measured with another transformers"
)


def test_the_page_is_the_generators():
    assert PAGE.read_text(encoding="utf-8") == render(COMMITTED)
    assert list(COMMITTED["families"]) == family_names()
    assert len(COMMITTED["families"]) > 100
    for name, row in COMMITTED["families"].items():
        assert row["cells"].keys() == COLUMNS.keys(), name


def test_every_cell_holds_or_is_refused():
    wrong = {
        (name, column): cell
        for name, row in COMMITTED["families"].items()
        for column, cell in row["cells"].items()
        if cell["state"] not in ("holds", "refused")
    }
    assert not wrong


@pytest.mark.parametrize("family", FEW)
def test_measured_again(family):
    found, committed = measure(family), COMMITTED["families"][family]
    assert found["activations"] == committed["activations"]
    for column, cell in found["cells"].items():
        known = committed["cells"][column]
        assert (cell["state"], cell.get("error")) == (known["state"], known.get("error")), (column, cell)


def test_a_wrong_head_is_seen(monkeypatch, tmp_path):
    family = Family("llama", str(tmp_path))
    right = policy_forward.logit_transform
    monkeypatch.setattr(policy_forward, "logit_transform", lambda config: right(config)._replace(scale=1.001))
    cell = family._compare("learned", family.trainer("learned"))
    assert cell["state"] == "differs"
    assert all(cell["differences"][name] > bound for name, bound in model_families.TOLERANCE.items() if name != "weights")
