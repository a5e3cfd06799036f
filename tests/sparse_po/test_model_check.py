"""What is found out of a model at construction: its head, its dropout, and whether the masks can read it."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import disable_dropout_in_model

from tests.helpers.sparse_po import LOG2, losses, make_trainer
from tests.helpers.tiny import FAMILIES, WORDS, save_tiny_model, tiny_model
from trl_ext.core.dropout import disable_dropout
from trl_ext.sparse_po.model_check import check_head


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
REFUSED = {
    "recurrent_gemma": {**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "head_dim": 8},
    "xlstm": {
        "hidden_size": 32, "embedding_dim": 32, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 4,
        "qk_dim_factor": 0.5, "v_dim_factor": 1.0,
    },
    "bert": {**SIZES, "is_decoder": True},
    "modernbert-decoder": {**SIZES, "global_attn_every_n_layers": 1},
}  # fmt: skip
FUNCTIONAL_DROPOUT = {
    "opt": {
        "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
        "layerdrop": 0.3,
    },
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "seed_oss": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "biogpt": {**SIZES, "layerdrop": 0.3},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.2, "attention_dropout": 0.2},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_heads_that_do_more_are_refused(family):
    if family == "modernbert-decoder" and Version(transformers.__version__) < Version("5.6"):
        pytest.skip("transformers 5.5 does not take its own defaults for this configuration")
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **ids, **REFUSED[family]))
    with pytest.raises(ValueError, match=rf"{type(model).__name__} \({family}\) does not compute its logits"):
        check_head(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_are_known_pass_and_nothing_changes(family, dtype):
    model = tiny_model(family).to(dtype).train()
    model.base_model.eval()
    training, state = [module.training for module in model.modules()], torch.get_rng_state()
    ids = torch.arange(3, 9).unsqueeze(0)
    before = model.eval()(ids).logits
    model.train().base_model.eval()
    check_head(model)
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert torch.equal(model.eval()(ids).logits, before)


@pytest.mark.parametrize(
    "after",
    [lambda x: 60 * torch.tanh(x / 60), lambda x: 1.05 * x, lambda x: x + 0.1],
    ids=["cap", "scale", "shift"],
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_small_changes_of_logits_are_seen(family, after):
    """On weights whose logits are far from any cap."""
    model = tiny_model(family, **({"final_logit_softcapping": 50.0} if family == "gemma2" else {}))
    check_head(model)

    def forward(**kwargs):
        output = model(**kwargs)
        output.logits = after(output.logits)
        return output

    with pytest.raises(ValueError, match=type(model).__name__):
        check_head(model, forward)


def test_a_model_that_hides_its_head_is_refused():
    model = tiny_model()
    other = tiny_model()
    with pytest.raises(ValueError, match="does not call the head"):
        check_head(model, other)


def test_trainer_refuses_the_family_at_construction(tmp_path, tokenizer):
    path = save_tiny_model(tmp_path / "model", "recurrent_gemma", **REFUSED["recurrent_gemma"])
    with pytest.raises(ValueError, match=r"RecurrentGemmaForCausalLM \(recurrent_gemma\)"):
        make_trainer(tmp_path, path, tokenizer)


@pytest.mark.parametrize("family", FUNCTIONAL_DROPOUT)
def test_no_dropout_is_left(family):
    model = tiny_model(family, **FUNCTIONAL_DROPOUT[family]).train()
    ids = torch.arange(3, 13).unsqueeze(0)
    disable_dropout_in_model(model)
    torch.manual_seed(0)
    assert not torch.equal(model(ids).logits, model(ids).logits)  # what TRL leaves
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, model.eval()(ids).logits)


EXPERTS = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
def test_no_noise_of_a_router_is_left(family):
    noise = {"router_jitter_noise": 0.2} | ({"input_jitter_noise": 0.2} if family == "phimoe" else {})
    model = tiny_model(family, **EXPERTS, **noise).train()
    ids = torch.arange(3, 13).unsqueeze(0)
    disable_dropout_in_model(model)
    assert not torch.equal(model(ids).logits, model(ids).logits)  # what TRL leaves
    disable_dropout(model)
    found = copy.deepcopy(model.train())(ids).logits
    assert torch.equal(found, model(ids).logits) and torch.equal(found, model.eval()(ids).logits)
    assert model.train().training and model.base_model.layers[0].training


@pytest.mark.parametrize("disable", [True, False])
def test_the_starcoder_family_starts_at_its_reference(disable, tmp_path, tokenizer):
    path = save_tiny_model(tmp_path / "model", "gpt_bigcode", **FUNCTIONAL_DROPOUT["gpt_bigcode"])
    trainer = make_trainer(tmp_path, path, tokenizer, max_steps=1, disable_dropout=disable)
    trainer.train()
    assert (losses(trainer) == [LOG2]) == disable
    trainer.save_model(str(tmp_path / "saved"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.attn_pdrop == 0.1
