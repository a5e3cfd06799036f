"""The demo's part on equilibrium propagation: what it measures and shows."""

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from trl_ext import EPModelForSequenceClassification, demo, playground
from trl_ext.demo import equilibrium as demo_equilibrium


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
