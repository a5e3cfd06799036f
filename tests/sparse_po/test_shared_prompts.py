"""Pairs that share their prompt: the same states, losses and gradients as two rows, or a refusal by name."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.masking_utils import create_chunked_causal_mask

from tests.helpers.sparse_po import first_batch, gradients, make_trainer, perturb
from tests.helpers.tiny import WORDS, save_tiny_model, tiny_model, tiny_pairs
from trl_ext.sparse_po import shared_prompts
from trl_ext.sparse_po.reference_pass import read_reference
from trl_ext.sparse_po.shared_prompts import branches_apart, check_shared_prompts, pack_pairs, probe_pairs


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
EXACT = {
    "llama": {},
    "llama-eager": {"attn_implementation": "eager"},
    "gpt2": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "opt": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "mixtral": {},
    "mistral": {**SIZES, "num_key_value_heads": 2, "sliding_window": 3},
    "gemma2": {"sliding_window": 3},
    "gemma3_text": {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 8},
}  # fmt: skip
REFUSED = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    # Of two layers, the second sees a window of its own making
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 8, "max_position_embeddings": 64,
    },
}  # fmt: skip


def final_states(model, inputs, share_prompt):
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    inputs |= {"share_prompt": share_prompt, "use_cache": False}
    with torch.no_grad():
        return read_reference(model.eval(), "ones", labels, **inputs).hidden


def built(family, sizes):
    return tiny_model(family.split("-")[0], **sizes)


def test_packing_by_hand():
    """The example at the head of the module, and a pair whose prompts differ, padded on the left."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [0, 5, 6, 7, 8], [5, 6, 7, 3, 0], [0, 0, 5, 4, 7]])
    tokens = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])
    packed = pack_pairs(ids, tokens)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 3, 0], [5, 6, 7, 8, 5, 4, 7]]
    assert packed.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0], [1, 2, 3, 4, 2, 3, 4]]
    assert packed.branch.tolist() == [[0, 0, 0, 1, 1, 2, 1], [1, 1, 1, 1, 2, 2, 2]]
    assert torch.equal(packed.unpack(packed.input_ids)[tokens.bool()], ids[tokens.bool()])
    predicted = tokens[:, 1:].bool()
    found = packed.predicting(packed.input_ids.unsqueeze(-1), predicted).squeeze(-1)
    expected = torch.where(tokens[:, :-1].bool(), ids[:, :-1], packed.input_ids[:, :1].repeat(2, 1))
    assert torch.equal(found, expected[predicted])


@pytest.mark.parametrize("family", EXACT)
def test_states_are_those_of_two_rows(family):
    model = built(family, EXACT[family])
    inputs = probe_pairs(model, len(WORDS))
    expected = final_states(model, inputs, False)
    torch.testing.assert_close(final_states(model, inputs, True), expected, rtol=1e-5, atol=1e-5)
    check_shared_prompts(model, lambda share: final_states(model, inputs, share))


def test_chunks_follow_the_positions():
    """The mask of attention in chunks, for each place of the batch that of its own row."""
    config = LlamaConfig(attention_chunk_size=3, attn_implementation="sdpa")
    ids = torch.tensor([[5, 6, 7, 8, 9, 3, 4], [5, 6, 7, 8, 3, 2, 2]])
    tokens = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    packed = pack_pairs(ids, tokens)
    known = inspect.signature(create_chunked_causal_mask).parameters
    # Called `cache` in transformers 5.24, and given by name alone in 5.5, which never leaves out a mask of chunks
    no_cache = {name: None for name in ("past_key_values", "cache") if name in known}
    whole = {"allow_is_causal_skip": False} if "allow_is_causal_skip" in known else {}
    with branches_apart(SimpleNamespace(config=config), packed):
        inputs = packed.inputs()
        mask = create_chunked_causal_mask(
            config, inputs["input_ids"].unsqueeze(-1).float(), inputs["attention_mask"],
            position_ids=inputs["position_ids"], **no_cache,
        )  # fmt: skip
    own = create_chunked_causal_mask(config, ids.unsqueeze(-1).float(), tokens, **no_cache, **whole)
    for row, length in enumerate(tokens.sum(dim=1).tolist()):
        slots = packed.slots[row, :length]
        assert torch.equal(mask[0, 0][slots][:, slots], own[row, 0, :length, :length])
        assert mask[0, 0][slots].sum() == own[row, 0, :length, :length].sum()  # and sees nothing else


def test_answers_do_not_see_each_other():
    """Another chosen answer of the same length leaves the states of the rejected answer as they were, to a bit."""
    model = built("gemma2", EXACT["gemma2"])
    inputs = probe_pairs(model, len(WORDS))
    chosen = inputs["completion_mask"][:2].sum()
    found = []
    for shift in (0, 1):
        inputs["input_ids"][:2] = torch.where(
            inputs["completion_mask"][:2] == 1, (inputs["input_ids"][:2] + shift) % 20, inputs["input_ids"][:2]
        )
        found.append(final_states(model, inputs, True))
    assert torch.equal(found[0][chosen:], found[1][chosen:]) and not torch.equal(found[0][:chosen], found[1][:chosen])


@pytest.mark.parametrize("family", REFUSED)
def test_other_models_are_refused_by_name(family):
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **ids, **REFUSED[family]))
    inputs = probe_pairs(model, len(WORDS))
    with pytest.raises(ValueError, match=rf"share_prompt=True` does not work with {type(model).__name__}.*False"):
        check_shared_prompts(model, lambda share: final_states(model, inputs, share))


LORA = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
SETTINGS = {
    "learned": ("gemma2", {"independent_masks": True, "gradient_checkpointing": True}, {}),
    "activation": ("llama", {"mask_type": "activation"}, {}),
    "experts": ("mixtral", {"mask_type": "activation", "loss_type": ["sigmoid", "sft"]}, {}),
    "given": ("llama", {"mask_type": "given", "gradient_checkpointing": True}, LORA),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients_are_those_of_two_rows(name, tmp_path, tokenizer):
    family, settings, arguments = SETTINGS[name]
    path = save_tiny_model(tmp_path / "model", family, **({"sliding_window": 3} if family == "gemma2" else {}))
    data = tiny_pairs(4)
    if name == "given":
        for side in ("chosen", "rejected"):
            spans = [[[1, len(text) // 2, 0.0], [len(text) // 2, len(text) - 6, 2.0]] for text in data[side]]
            data = data.add_column(f"{side}_token_weights", spans)
    found = []
    for share_prompt in (False, True):
        trainer = make_trainer(
            tmp_path, path, tokenizer, data=data, share_prompt=share_prompt, trainer_arguments=arguments, **settings
        )
        perturb(trainer.model)
        loss = trainer.compute_loss(trainer.model, first_batch(trainer))
        loss.backward()
        masks = {name: p.grad for name, p in trainer.masks.named_parameters()}
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        found.append((loss.detach(), gradients(trainer.model), masks, metrics))
    torch.testing.assert_close(found[1][:3], found[0][:3], rtol=1e-4, atol=1e-5)
    assert found[1][3] == pytest.approx(found[0][3], rel=1e-5, abs=1e-5)


def test_training_starts_at_log_2_and_real_pairs_are_compared_once(tmp_path, tokenizer, monkeypatch):
    path = save_tiny_model(tmp_path / "model", "gemma2", sliding_window=3)
    trainer = make_trainer(tmp_path, path, tokenizer, share_prompt=True, max_steps=2)
    compared = []

    def count(model, states):
        compared.append(states(True).shape)
        check_shared_prompts(model, states)

    monkeypatch.setattr("trl_ext.sparse_po.sparse_po_trainer.check_shared_prompts", count)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931472, abs=2e-7)
    assert trainer.state.log_history[0]["kl/chosen"] == 0 and len(compared) == 1
    # A model that does not see the mask is stopped by the first batch, where construction could not
    trainer._compared_shared_prompts = False
    monkeypatch.setattr(shared_prompts, "attention_masks_changed_by", lambda *_: torch.no_grad())
    with pytest.raises(ValueError, match="Gemma2ForCausalLM.*differs by"):
        trainer.compute_loss(trainer.model, first_batch(trainer))


def test_refused_at_construction(tmp_path, tokenizer):
    path = save_tiny_model(tmp_path / "model", "bloom", hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="share_prompt=True.*BloomForCausalLM"):
        make_trainer(tmp_path, path, tokenizer, share_prompt=True)
