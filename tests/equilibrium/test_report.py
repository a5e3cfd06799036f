"""The course of the gradient's quality through training, and the part of the demo that shows it."""

import json

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.equilibrium import ASYMMETRIC, reward_model, trainer_of
from tests.helpers.tiny import save_tiny_model
from trl_ext import EPAlignmentCallback, EPModelForSequenceClassification, EPRewardTrainer, playground
from trl_ext.demo import demo
from trl_ext.demo import equilibrium as demo_equilibrium


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def train(folder, output, **settings):
    trainer = trainer_of(EPRewardTrainer, folder, output, reward_model(folder, **settings), max_steps=2)
    callback = EPAlignmentCallback(trainer, num_examples=4)
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def test_it_measures_at_the_start_and_at_every_log_and_leaves_training_alone(folder, tmp_path):
    plain = trainer_of(EPRewardTrainer, folder, tmp_path / "plain", reward_model(folder, **ASYMMETRIC), max_steps=2)
    plain.train()
    trainer, callback = train(folder, tmp_path / "seen", **ASYMMETRIC)
    assert [entry["step"] for entry in callback.history] == [0, 1, 2]
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name
    first = callback.history[0]
    assert first["weight_angle"] == pytest.approx(90, abs=1e-3) and len(first["cosines"]) == 2
    assert min(first["cosines"]) < 0.97
    assert json.loads((tmp_path / "seen" / "alignment.json").read_text()) == callback.history
    assert (tmp_path / "seen" / "alignment.png").stat().st_size > 5000


@pytest.mark.parametrize("settings", [{}, {**ASYMMETRIC, "correction": "asymep"}], ids=["symmetric", "asymep"])
def test_the_cosine_of_an_exact_estimator_is_one(settings, folder, tmp_path):
    _, callback = train(folder, tmp_path, **settings)
    for entry in callback.history:
        assert entry["cosines"] == pytest.approx([1.0, 1.0], abs=1e-4)


def test_wrong_input(folder, tmp_path):
    trainer = trainer_of(EPRewardTrainer, folder, tmp_path)
    with pytest.raises(ValueError, match="num_examples.*0"):
        EPAlignmentCallback(trainer, 0)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="eval_dataset"):
        EPAlignmentCallback(trainer)
    trainer.is_fsdp_enabled = True
    trainer.eval_dataset = trainer.train_dataset
    with pytest.raises(ValueError, match="ZeRO-3 and FSDP"):
        EPAlignmentCallback(trainer)


def test_the_demo_measures_a_reward_model_against_the_truth(tmp_path, monkeypatch):
    tokenizer = playground.build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = EPModelForSequenceClassification.from_backbone(
        LlamaForCausalLM(config), num_labels=1, hidden_features=[8, 8]
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = demo_equilibrium.reward_quality(tmp_path)
    assert 0.3 < found["accuracy"] < 0.7 and abs(found["correlation"]) < 0.5

    # A model whose reward is the truth scores perfectly
    class Truth:
        def eval(self):
            return self

        def __call__(self, input_ids, **inputs):
            texts = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
            values = [[playground.sentiment(text)] for text in texts]
            return type("Output", (), {"logits": torch.tensor(values)})

    monkeypatch.setattr(EPModelForSequenceClassification, "from_pretrained", lambda folder: Truth())
    found = demo_equilibrium.reward_quality(tmp_path)
    assert found["accuracy"] == 1.0 and found["correlation"] == pytest.approx(1.0)
    console = Console(record=True, width=100)
    row = {"run": "without", "cosines": [0.25, 1.0], "weight_angle": 89.6, **found}
    console.print(demo_equilibrium.equilibrium_table([row]))
    text = console.export_text()
    assert "0.25 / 1.00" in text and "90\N{DEGREE SIGN}" in text
    assert "equilibrium" in demo.PARTS
