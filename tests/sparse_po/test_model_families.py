"""What docs/model_families.md says of a few families is measured again, and a wrong head would be seen."""

import json
from importlib.metadata import version

import pytest

from tests.sparse_po.families_page import RESULTS, TOLERANCE
from tests.sparse_po.model_families import Family, measure
from trl_ext.sparse_po import policy_forward


COMMITTED = json.loads(RESULTS.read_text(encoding="utf-8"))
FEW = ("falcon, alibi", "mixtral, router loss")

pytestmark = pytest.mark.skipif(
    version("transformers") != COMMITTED["versions"]["transformers"], reason="measured with another transformers"
)


# PEFT makes the pattern itself, for the experts' fused parameters, and then looks for it among modules alone
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("family", FEW)
def test_measured_again(family):
    found, committed = measure(family), COMMITTED["families"][family]
    assert found["activations"] == committed["activations"]
    for column, cell in found["cells"].items():
        known = committed["cells"][column]
        assert (cell["state"], cell.get("error")) == (known["state"], known.get("error")), (column, cell)


def test_a_wrong_head_is_seen(monkeypatch, tmp_path):
    family = Family("llama", str(tmp_path))
    trainer = family.trainer("learned")
    trainer.train()  # while the policy is the reference, a head scales both and the loss stays
    right = policy_forward.logit_transform
    monkeypatch.setattr(policy_forward, "logit_transform", lambda config: right(config)._replace(scale=1.001))
    cell = family._compare("learned", trainer)
    assert cell["state"] == "differs"
    found = {name for name, bound in TOLERANCE.items() if cell["differences"][name] > bound}
    assert found == {"tokens", "loss", "gradients"}  # masks do not read the head
