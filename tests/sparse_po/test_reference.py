"""The reference is what the policy was: in mixed precision to the last bit, and whatever of it PEFT wraps."""

import copy

import pytest
import torch
from peft import LoraConfig

from tests.helpers.sparse_po import LOG2, first_batch, losses, make_trainer
from tests.helpers.tiny import save_tiny_model, tiny_model


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_type": "learned", "independent_masks": True},
        {"mask_type": "activation"},
        {"mask_type": "ones"},
        {"gradient_checkpointing": True},
        {"peft": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_first_step_in_mixed_precision(settings, tmp_path, tiny_path, tokenizer):
    settings = dict(settings)
    peft = {"peft_config": LoraConfig(target_modules=["q_proj"])} if settings.pop("peft", False) else {}
    trainer = make_trainer(
        tmp_path, tiny_path, tokenizer, max_steps=1, bf16=True, learning_rate=0.0, trainer_arguments=peft, **settings
    )
    trainer.train()
    assert losses(trainer) == [LOG2]
    history = trainer.state.log_history[0]
    assert all(history[name] == 0 for name in ("kl/chosen", "kl/rejected", "rewards/margins", "rewards/accuracies"))
    batch = first_batch(trainer)
    in_float32 = tiny_model()(
        **{name: batch[name] for name in ("input_ids", "attention_mask")}, output_hidden_states=True
    )
    hidden = in_float32.hidden_states[-1][:, :-1][batch["completion_mask"][:, 1:].bool()]
    distance = (trainer._reference_input(batch).states.hidden - hidden).abs().max()
    assert 1e-3 < distance < 0.1  # it ran in bfloat16


TOKENS = [3, 4, 5, 6]


# PEFT 0.18 takes any output embeddings that are saved for tied ones
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("tied", "adapter"),
    [
        (True, {"trainable_token_indices": {"embed_tokens": TOKENS}}),
        (False, {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}}),
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
    ids=["tied-rows", "untied-rows", "untied-saved"],
)
def test_trained_token_rows_stay_out_of_the_reference(tied, adapter, tmp_path, tokenizer):
    path = save_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    config = LoraConfig(target_modules=["q_proj"], **adapter)
    trainer = make_trainer(tmp_path, path, tokenizer, trainer_arguments={"peft_config": config})
    generator = torch.Generator().manual_seed(0)
    base = copy.deepcopy(trainer.policy.state_dict())
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "token_masks" not in name and parameter.requires_grad:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    batch = first_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = {name: values[-1] for name, values in trainer._metrics["train"].items()}

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    completion = batch["completion_mask"][:, 1:]
    reference = tiny_model(tie_word_embeddings=tied)
    with torch.no_grad():
        policy_log_probs = trainer.model(**inputs).logits[:, :-1].double().log_softmax(-1)
        log_probs = reference(**inputs).logits[:, :-1].double().log_softmax(-1)
    divergences = ((log_probs.exp() * (log_probs - policy_log_probs)).sum(-1) * completion).sum(1)
    labels = batch["input_ids"][:, 1:].unsqueeze(-1)
    log_ratios = ((policy_log_probs - log_probs).gather(-1, labels).squeeze(-1) * completion).sum(1)
    for side, rows in (("chosen", slice(0, 4)), ("rejected", slice(4, 8))):
        assert found[f"kl/{side}"] == pytest.approx(divergences[rows].mean().item(), rel=1e-4)
    assert log_ratios.abs().mean() > 1
    trained = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    rows = [grad for name, grad in trained.items() if "trainable_tokens" in name or "modules_to_save" in name]
    assert rows and all(grad is not None and grad.abs().max() > 0 for grad in rows)
    assert base.keys() == trainer.policy.state_dict().keys()


def test_projected_last_state(tmp_path, tokenizer):
    """opt-350m: the last hidden states are narrower than the layers'."""
    shape = {
        "hidden_size": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
        "max_position_embeddings": 64, "do_layer_norm_before": False,
    }  # fmt: skip
    path = save_tiny_model(tmp_path / "model", "opt", **shape)
    trainer = make_trainer(tmp_path, path, tokenizer, max_steps=2)
    batch = first_batch(trainer)
    states = trainer._reference_input(batch).states
    hidden = []
    for layer in trainer.ref_model.model.decoder.layers:
        layer.register_forward_hook(
            lambda _m, _i, output: hidden.append(output if torch.is_tensor(output) else output[0])
        )
    trainer.ref_model(**{name: batch[name] for name in ("input_ids", "attention_mask")})
    completion = batch["completion_mask"][:, 1:].bool()
    expected = torch.stack([torch.nn.functional.layer_norm(h[:, :-1][completion], (32,)) for h in hidden])
    torch.testing.assert_close(states.layer_states, expected, rtol=1e-4, atol=1e-5)
    assert states.hidden.size(-1) == 16
    trainer.train()
    assert losses(trainer)[0] == LOG2 > losses(trainer)[1]
    activation = make_trainer(tmp_path, path, tokenizer, max_steps=1, mask_type="activation")
    activation.train()
    assert losses(activation) == [LOG2]
