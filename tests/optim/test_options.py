"""Options: values that are refused, what an optimizer is handed, and weights named in `projection`."""

import re
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.optim import params_of
from trl_ext.optim import SGDP, AdamP, scale_invariant_weights
from trl_ext.optim.options import projection_of


BOTH = [(AdamP, {}), (SGDP, {"momentum": 0.9})]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr` must be finite"),
        ({"lr": float("nan")}, "`lr` must be finite"),
        ({"eps": -1e-8}, "`eps`"),
        ({"weight_decay": -0.1}, "`weight_decay`"),
        ({"delta": float("inf")}, "`delta`"),
        ({"wd_ratio": -1.0}, "`wd_ratio`"),
        ({"betas": (1.0, 0.999)}, r"`betas\[0\]`"),
        ({"betas": (0.9,)}, "`betas` must be two"),
        ({"lr": torch.ones(2)}, "one element"),
        ({"projection": "row"}, "`projection` must be one of"),
        ({"projection": {"q_proj": "row"}}, "`projection"),
        ({"projection": {"q_proj[": "layer"}}, "pattern"),
        ({"on_unknown_shards": "ignore"}, "`on_unknown_shards`"),
        ({"state_dtype": torch.int32}, "`state_dtype`"),
        ({"state_dtype": torch.float16}, "`state_dtype=torch.float16` can't hold the running averages"),
        ({"state_dtype": torch.float8_e4m3fn}, "can't hold the running averages"),
        ({"lr": "1e-3"}, r"`lr` must be a number, got '1e-3' \(str\)"),
        ({"eps": None}, r"`eps` must be a number, got None"),
        ({"weight_decay": True}, "`weight_decay` must be a number, got True"),
        ({"betas": "0.9"}, "`betas` must be two numbers"),
        ({"betas": (0.9, None)}, r"`betas\[1\]` must be a number, got None"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        AdamP(params_of((2, 2)), **options)
    with pytest.raises(ValueError, match=message):
        AdamP([{"params": params_of((2, 2)), **options}])


@pytest.mark.parametrize(
    ("options", "message"), [({"momentum": 1.0}, "`momentum`"), ({"dampening": -1}, "`dampening`")]
)
def test_wrong_options_of_sgdp(options, message):
    with pytest.raises(ValueError, match=message):
        SGDP(params_of((2, 2)), lr=0.1, **options)


@pytest.mark.parametrize(
    "options", [{"foreach": True, "fused": True}, {"differentiable": True, "fused": True},
                {"differentiable": True, "capturable": True}]
)  # fmt: skip
def test_options_that_exclude_each_other(options):
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        AdamP(params_of((2, 2)), **options)


@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_refused_parameters(cls, options):
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        cls(embedding.parameters(), lr=0.1, **options).step()
    with pytest.raises(RuntimeError, match="complex parameters"):
        cls(params_of((2, 2), dtype=torch.complex64), lr=0.1, **options).step()
    params = params_of((4, 3))
    optimizer = cls(params, lr=0.1, **options)
    optimizer.step()
    params[0].data = torch.randn(5, 3)
    params[0].grad = torch.randn(5, 3)
    with pytest.raises(RuntimeError, match=r"state of a parameter has shape \(4, 3\)"):
        optimizer.step()
    transposed = torch.nn.Parameter(torch.randn(5, 6).t())
    transposed.grad = torch.randn(6, 5)
    with pytest.raises(RuntimeError, match="rows follow each other"):
        cls([transposed], lr=0.1, capturable=True, **options).step()


def test_projection_by_name():
    from transformers import AutoConfig

    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 4), "mlp": torch.nn.Linear(6, 4)})
    optimizer = AdamP(model.named_parameters(), projection={"q_proj": "layer"}, lr=1e-3)
    for param in model.parameters():
        param.grad = param.detach().clone()  # Radial: no test would pass
    before = model["q_proj"].weight.detach().clone()
    optimizer.step()
    report = optimizer.report()
    assert report["q_proj.weight"]["layer"] == 1
    assert "mlp.weight" in report and report["mlp.weight"]["layer"] == 0
    # sign(w) without its radial part
    sign, change = before.sign(), before - model["q_proj"].weight.detach()
    expected = 1e-3 * (sign - before * (sign * before).sum() / before.square().sum())
    torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-7)

    presets = scale_invariant_weights(AutoConfig.for_model("qwen3"))
    assert list(presets.values()) == ["head/128"] and "q_proj" in next(iter(presets))
    with pytest.raises(ValueError, match="'gpt2'"):
        scale_invariant_weights(AutoConfig.for_model("gpt2"))
    unnamed = AdamP(params_of((3, 3)), projection={"q_proj": "layer"})
    with pytest.raises(ValueError, match="has no name"):
        unnamed.step()


def test_names_in_multimodal_models_and_adapters():
    """The language model's own and the copies that PEFT trains, not those of other towers."""
    text = SimpleNamespace(head_dim=8)
    presets = scale_invariant_weights(SimpleNamespace(model_type="gemma3", text_config=text))
    assert list(presets.values()) == ["layer", "head/8"]
    gemma = "|".join(presets)
    tower, layer = "model.vision_tower.vision_model.encoder.layers.0", "model.language_model.layers.0"
    assert not re.search(gemma, f"{tower}.self_attn.q_proj.weight")
    assert re.search(gemma, f"{layer}.self_attn.q_proj.weight") and re.search(gemma, f"{layer}.mlp.down_proj.weight")
    assert re.search(gemma, f"base_model.model.{layer}.mlp.up_proj.modules_to_save.default.weight")
    assert not re.search(gemma, f"base_model.model.{layer}.mlp.up_proj.original_module.weight")
    assert not re.search(gemma, f"base_model.model.{layer}.self_attn.q_proj.lora_A.default.weight")
    assert not re.search(gemma, f"{layer}.mlp.gate_proj.weight")
    biased = SimpleNamespace(model_type="qwen3_vl", text_config=SimpleNamespace(attention_bias=True))
    assert scale_invariant_weights(biased) == {}


@pytest.mark.parametrize("model_type", ["olmo3", "glm4", "gemma3_text", "gemma3n_text", "qwen3"])
def test_named_weights_are_scale_invariant(model_type):
    """The loss does not change with their norm: without the norms' epsilon the gradient is orthogonal to each."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"num_kv_shared_layers": 0, "laurel_rank": 4, "hidden_size_per_layer_input": 4}
    settings |= {"activation_sparsity_pattern": None, "vocab_size_per_layer_input": 32}
    config = AutoConfig.for_model(
        model_type, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2, vocab_size=32,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-12, pad_token_id=0,
        **(settings if "gemma3n" in model_type else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    ids = torch.arange(1, 17).view(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    found = 0
    for name, weight in model.named_parameters():
        view = projection_of({"projection": scale_invariant_weights(config)}, name)
        if view != "none":
            found += 1
            num_rows = int(view.removeprefix("head/")) if view != "layer" else weight.size(0)
            rows = (tensor.reshape(-1, num_rows * weight.size(1)) for tensor in (weight, weight.grad))
            cosine = torch.nn.functional.cosine_similarity(*rows, dim=1)
            assert float(cosine.abs().max()) < 1e-4, (name, cosine)
    assert found >= 2 * 2
