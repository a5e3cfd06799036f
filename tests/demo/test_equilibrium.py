"""The demo's part on equilibrium propagation: what it measures and shows."""

import json

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from trl_ext import EPModelForSequenceClassification, demo, playground
from trl_ext.demo import equilibrium as demo_equilibrium
from trl_ext.scripts.equilibrium_reward import make_parser


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
    row = {"run": "without", "cosines": [0.25, 1.0], "weight_angle": 89.6}
    row |= demo_equilibrium.mean_quality([found, {"accuracy": 0.5, "correlation": 0.0}])
    console.print(demo_equilibrium.equilibrium_table([row]))
    text = console.export_text()
    assert "0.750 (0.50 to 1.00)" in text and "0.50" in text
    assert "0.25 / 1.00" in text and "90\N{DEGREE SIGN}" in text
    assert "equilibrium" in demo.PARTS


def test_every_run_has_every_seed_and_settings_that_the_command_takes(tmp_path, monkeypatch):
    parser = make_parser()
    seen = []

    def train(folder, overrides):
        recipe = ["--config", "equilibrium/playground_reward", "--output_dir", str(folder), *overrides]
        _, args, _, _, head = parser.parse_args_and_config(recipe)
        assert args.max_steps == 7 and (head.show_alignment > 0) == (args.eval_strategy != "no")
        seen.append((args.homeostasis_coef, args.seed, head.show_alignment > 0))
        folder.mkdir(parents=True)
        points = [{"step": step, "cosines": [0.5, 1.0], "weight_angle": 90.0} for step in (0, 7)]
        (folder / "alignment.json").write_text(json.dumps(points))
        return {"accuracy": int(folder.name[-1]) / 10, "correlation": 0.5}

    monkeypatch.setattr(demo_equilibrium, "train_and_measure", train)
    console = Console(record=True, width=100)
    part = demo_equilibrium.equilibrium_part(tmp_path, console, max_steps=7)
    rows = part.show([task.function(*task.arguments) for task in part.tasks])
    seeds = demo_equilibrium.SEEDS
    assert seen == [(coef, seed, seed == seeds[0]) for coef in (10.0, 0.0) for seed in seeds]
    assert rows == json.loads((tmp_path / "results.json").read_text())
    assert [row["accuracy"] for row in rows] == [pytest.approx(sum(seed % 10 for seed in seeds) / 10 / len(seeds))] * 2
    assert (tmp_path / "alignment.png").stat().st_size > 5000
