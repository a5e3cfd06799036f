"""The view by heads: a weight before a normalisation of each head is scale-invariant in each."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.optim import params_of
from trl_ext.optim import AdamP, scale_invariant_weights


def orthogonal_in_heads(param, num_rows, step):
    """A gradient that is orthogonal to each head, and to no row of it."""
    grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
    heads, weight = grad.view(-1, num_rows * param.size(1)), param.detach().view(-1, num_rows * param.size(1))
    heads -= weight * ((heads * weight).sum(1) / weight.square().sum(1)).unsqueeze(1)
    return grad


@pytest.mark.parametrize("execution", [{}, {"fused": False, "foreach": False}, {"foreach": True}, {"nesterov": True}])
def test_heads_are_rows(execution):
    """The weight `(H * N, C)` takes the step of the weight `(H, N * C)` at the channel level."""
    (weight,), other = params_of((6, 5)), torch.nn.Parameter(params_of((6, 5))[0].detach().view(3, 10).clone())
    ours = AdamP([weight], lr=0.1, weight_decay=0.1, projection="head/2", **execution)
    theirs = AdamP([other], lr=0.1, weight_decay=0.1, projection="channel", **execution)
    for step in range(4):
        weight.grad = orthogonal_in_heads(weight, 2, step)
        other.grad = weight.grad.view(3, 10).clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(weight.detach().view(3, 10), other.detach(), rtol=1e-6, atol=1e-7)
    assert ours.report()["0.0"]["channel"] == 1


def test_rows_that_are_no_heads_are_refused():
    (weight,) = params_of((6, 5))
    with pytest.raises(ValueError, match=r'"head/4" for the weight None of shape \(6, 5\).*no multiple of 4'):
        AdamP([weight], projection="head/4").step()


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_models_with_normalised_heads(model_type):
    """Scaling one head's rows changes nothing, scaling one row does; the preset names them so."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-12,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double()
    assert "head/8" in scale_invariant_weights(config).values()
    tokens = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad():
        expected = model(tokens).logits
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight[:8] *= 3
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-6)
        weight[3] *= 3
        assert not torch.allclose(model(tokens).logits, expected, rtol=1e-3, atol=1e-4)
    optimizer = AdamP(model.named_parameters(), lr=1e-3, projection=scale_invariant_weights(config))
    model(tokens).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    report = optimizer.report()
    assert report["model.layers.0.self_attn.q_proj.weight"]["channel"] == 1
