"""The router's loss is the one that each family's own forward gives, by whatever names its configuration has."""

import pytest
import torch
import transformers
from packaging.version import Version

from tests.helpers.sparse_po import make_trainer
from tests.helpers.tiny import tiny_tokenizer
from tests.sparse_po.families import save_tiny_family, tiny_family_model
from trl_ext.sparse_po.router_loss import router_loss


recent = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"),
    reason="transformers 5.5 has the family not, not its router's outputs, or no forward of it that runs",
)
MASK = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])


def outputs(name):
    model = tiny_family_model(name)
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        return model, model(input_ids=ids, attention_mask=MASK, output_router_logits=True, use_cache=False)


@pytest.mark.parametrize(
    "name",
    [
        "mixtral", pytest.param("granitemoe", marks=recent), "phimoe", "gpt_oss",
        pytest.param("deepseek_v4", marks=recent), "jetmoe",
    ],
)  # fmt: skip
def test_equals_the_models_own(name):
    model, output = outputs(name)
    found = router_loss(model, output.router_logits, MASK)
    assert output.aux_loss > 0.5 and torch.equal(found, output.aux_loss)
    assert not torch.equal(found, router_loss(model, output.router_logits))  # padding is not counted


@recent
def test_a_family_without_one():
    model, output = outputs("llama4_text")
    assert getattr(output, "aux_loss", None) is None
    assert router_loss(model, output.router_logits, MASK) == 0
    assert router_loss(tiny_family_model("mixtral"), (), MASK) == 0


def test_a_loss_of_another_form_is_refused():
    model = tiny_family_model("doge")
    with pytest.raises(NotImplementedError, match=r"DogeForCausalLM \(doge\).*num_keys.*router_aux_loss_coef=0"):
        router_loss(model, (torch.zeros(24, 4),), MASK)


@recent
def test_it_is_refused_before_training(tmp_path):
    path = save_tiny_family("doge, experts", str(tmp_path / "model"))
    with pytest.raises(NotImplementedError, match="num_keys"):
        make_trainer(tmp_path, path, tiny_tokenizer())
