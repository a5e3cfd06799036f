"""4-bit weights on a CPU that has AVX512-BF16, where bitsandbytes packs them at a forward in evaluation mode."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.helpers import constrained_grpo, constrained_ppo
from tests.helpers.equilibrium import reward_model, trainer_of
from tests.helpers.sparse_po import make_trainer
from tests.helpers.tiny import qlora_arguments, save_tiny_model, tiny_tokenizer
from trl_ext import EPRewardTrainer
from trl_ext.core.four_bits import keep_four_bits_trainable


bitsandbytes = pytest.importorskip("bitsandbytes")
TOKENS = torch.arange(8)[None] + 3


@pytest.fixture
def model(tmp_path):
    """A model of 4 bits, as it is on such a CPU."""
    path = save_tiny_model(tmp_path / "model", hidden_size=64)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    for layer in layers_of(loaded):
        assert hasattr(layer, "support_avx512bf16_for_cpu")  # as bitsandbytes calls it
        layer.support_avx512bf16_for_cpu = True
    return loaded


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def test_weights_are_not_packed_in_evaluation_mode(model):
    keep_four_bits_trainable(model)
    with torch.no_grad():
        evaluated = model.eval()(TOKENS).logits
    assert len(layers_of(model)) == 14
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers_of(model))
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    logits = model.train()(TOKENS).logits
    torch.testing.assert_close(logits, evaluated)
    logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_packed_weights_are_refused(model):
    layers_of(model)[3].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"`model\.layers\.0\.self_attn\.o_proj` is packed.*just loaded"):
        keep_four_bits_trainable(model)


def test_other_layers_are_left_alone():
    layer = torch.nn.Linear(2, 2)
    keep_four_bits_trainable(layer)
    assert not hasattr(layer, "support_avx512bf16_for_cpu")


def sparse_po(folder, path):
    return make_trainer(folder, path, tiny_tokenizer(), bf16=True, trainer_arguments=qlora_arguments())


def ppo(folder, path):
    return constrained_ppo.make(folder, path, bf16=True, trainer_arguments=qlora_arguments(), **constrained_ppo.XI)


def grpo(folder, path):
    return constrained_grpo.make(
        folder, path, bf16=True, trainer_arguments=qlora_arguments(), **constrained_grpo.BOUNDS
    )


def equilibrium(folder, path):
    settings = qlora_arguments()
    model = reward_model(path, quantization_config=settings["quantization_config"])
    return trainer_of(EPRewardTrainer, path, folder, model, settings["peft_config"])


@pytest.mark.parametrize("made", [sparse_po, ppo, grpo, equilibrium])
def test_every_trainer_keeps_them(made, tmp_path, monkeypatch):
    """Layers are made as on such a CPU, whatever this one is."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    trainer = made(tmp_path / "out", save_tiny_model(tmp_path / "model", hidden_size=64))
    layers = layers_of(trainer.model)
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
