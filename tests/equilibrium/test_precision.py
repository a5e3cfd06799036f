"""Backbones in fp16 and 4 bits: the head computes and trains in float32."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig, MambaConfig, MambaModel

from tests.helpers.equilibrium import IDS, MASK
from tests.helpers.tiny import save_tiny_model, tiny_pairs, tiny_tokenizer
from trl_ext import EPConfig, EPModelForSequenceClassification, EPRewardConfig, EPRewardTrainer
from trl_ext.equilibrium.modeling import active_head


LABELS = torch.tensor([0, 2, 1])
IN_BF16 = {"rtol": torch.finfo(torch.bfloat16).eps, "atol": torch.finfo(torch.bfloat16).eps}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=64)


def classifier(folder, **settings):
    torch.manual_seed(0)
    return EPModelForSequenceClassification.from_pretrained(
        folder, **{"num_labels": 3, "hidden_features": [8, 8], **settings}
    )


def gradients(model, scale):
    """Gradients of the loss times a scale, as a `GradScaler` has it."""
    model.zero_grad()
    loss = model(IDS, attention_mask=MASK, labels=LABELS).loss
    assert loss.dtype == torch.float32 and loss.isfinite()
    (loss * scale).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"feedback": "asymmetric", "feedback_angle": 60.0, "correction": "asymep"}, {"spectral_cap": 0.3}],
    ids=["symmetric", "asymep", "cap"],
)
def test_fp16_backbone_and_a_loss_scale(settings, folder):
    model = classifier(folder, dtype=torch.float16, **settings)
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float16}
    assert {parameter.dtype for parameter in model.score.parameters()} == {torch.float32}
    plain, small, large = (gradients(model, scale) for scale in (1.0, 64.0, 65536.0))
    for name, gradient in plain.items():
        assert gradient.isfinite().all() and gradient.any(), name
        if name.startswith("score."):
            assert torch.equal(large[name], 65536.0 * gradient), name
        else:
            assert gradient.dtype == torch.float16
            torch.testing.assert_close(small[name], 64.0 * gradient, rtol=0.02, atol=0.02)


def test_fp16_gradients_are_those_of_float32(folder):
    half, full = classifier(folder, dtype=torch.float16), classifier(folder, dtype=torch.float32)
    half.score.load_state_dict(full.score.state_dict())
    scaled, expected = gradients(half, 64.0), gradients(full, 1.0)
    for name, gradient in expected.items():
        found = scaled[name].float() / 64.0
        assert torch.nn.functional.cosine_similarity(found.flatten(), gradient.flatten(), dim=0) > 0.99, name
        assert found.norm() == pytest.approx(gradient.norm().item(), rel=0.05), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_way_into_half_precision(dtype, folder, tmp_path):
    """Weights are drawn, made orthogonal and capped in float32, whatever dtype the model is built or cast in."""
    asymmetric = {"feedback": "asymmetric", "feedback_angle": 90.0, "input_norm": "standardize"}
    backbone = AutoConfig.from_pretrained(folder)
    models = {
        "backbone": classifier(folder, dtype=dtype, **asymmetric),
        "from_config": AutoModelForSequenceClassification.from_config(
            EPConfig(text_config=backbone, num_labels=3, hidden_features=[8, 8], **asymmetric), dtype=dtype
        ),
    }
    models["backbone"].save_pretrained(tmp_path)
    models["saved"] = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    for name, model in models.items():
        assert {p.dtype for p in model.model.parameters()} == {dtype}, name
        assert {p.dtype for p in model.score.parameters()} == {torch.float32}, name
        assert torch.linalg.matrix_norm(model.score.forward_weight_1, 2).item() == pytest.approx(0.95), name
        assert all(gradient.isfinite().all() for gradient in gradients(model.train(), 1.0).values()), name
    # A cast by hand rounds the stored weights; the head still relaxes in float32, and goes back with `float()`
    whole = classifier(folder, dtype=torch.float32)
    with torch.no_grad():
        whole.score.forward_weight_1.mul_(3.0)  # above the cap
    half = classifier(folder, dtype=torch.float32)
    half.load_state_dict(whole.state_dict())
    half.to(dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    logits = half(IDS, attention_mask=MASK).logits
    assert logits.dtype == torch.float32 and half.score.statistics.free_residual <= 1e-4
    resolution = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(logits, whole(IDS, attention_mask=MASK).logits, rtol=resolution, atol=resolution)
    half.score.float()
    torch.testing.assert_close(half(IDS, attention_mask=MASK).logits, logits, rtol=0, atol=1e-4)


def test_a_state_space_backbone():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=36, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=0)
    model = EPModelForSequenceClassification.from_backbone(MambaModel(config), num_labels=3, hidden_features=[8, 8])
    output = model.train()(IDS, attention_mask=MASK, labels=LABELS)
    output.loss.backward()
    assert output.attentions is None and output.logits.shape == (3, 3)
    assert all(p.grad is not None for p in model.parameters())


def quantized(folder, **settings):
    pytest.importorskip("bitsandbytes")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return classifier(folder, quantization_config=options, **settings)


def assert_same_weights(found, expected):
    """Bit for bit, those of four bits with their scales."""
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys() and any("quant_state" in name for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def lora():
    return LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["score"])


def test_four_bits_on_a_backbone_and_on_a_saved_model(folder, tmp_path):
    classifier(folder).save_pretrained(tmp_path / "whole")
    fresh, saved = quantized(folder), quantized(tmp_path / "whole")
    for model in (fresh, saved):
        kinds = {type(p).__name__ for name, p in model.model.named_parameters() if name.endswith("proj.weight")}
        assert kinds == {"Params4bit"} and {p.dtype for p in model.score.parameters()} == {torch.float32}
        assert model.is_loaded_in_4bit and model.is_quantized and model.hf_quantizer is not None
        assert model.quantization_method == "bitsandbytes" and model.config.quantization_config.load_in_4bit
    fresh.save_pretrained(tmp_path / "four_bits")
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "four_bits", output_loading_info=True)
    assert not any(info.values()) and loaded.is_loaded_in_4bit
    assert_same_weights(loaded, fresh)
    torch.testing.assert_close(
        loaded(IDS, attention_mask=MASK).logits, fresh(IDS, attention_mask=MASK).logits, **IN_BF16
    )


def test_qlora_trains_the_head_in_float32(folder, tmp_path):
    model = get_peft_model(prepare_model_for_kbit_training(quantized(folder), False), lora())
    head = active_head(model)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in head.parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: p.clone() for name, p in head.named_parameters()}
    model.train()(IDS, attention_mask=MASK, labels=LABELS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())
    adapters = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert len(adapters) == 4 and all(gradient.any() for gradient in adapters.values())
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in head.named_parameters())

    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(folder), str(tmp_path)).eval()
    assert_same_weights(again, model)
    with torch.no_grad():  # with a gradient bitsandbytes takes another kernel
        found, expected = again(IDS, attention_mask=MASK).logits, model(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found, expected, **IN_BF16)


def test_reward_trainer_with_qlora(folder, tmp_path):
    arguments = EPRewardConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, logging_steps=1,
        use_cpu=True, bf16=True, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = EPRewardTrainer(
        quantized(folder, num_labels=1), arguments, train_dataset=tiny_pairs(8), processing_class=tiny_tokenizer(),
        peft_config=lora(),
    )  # fmt: skip
    head = active_head(trainer.model)
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    adapters = {p.dtype for name, p in trainer.model.named_parameters() if "lora_" in name}
    assert adapters == {torch.bfloat16}  # TRL's, as the QLoRA paper has it
    before = {name: p.clone() for name, p in head.named_parameters()}
    trainer.train()
    assert {name for name, p in head.named_parameters() if torch.equal(p, before[name])} <= {"readout_bias"}
    assert trainer.state.log_history[1]["ep/nudged_sweeps"] > 0
