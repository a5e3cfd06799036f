"""The experiment of recipes/experiments/sparse_po_smollm2, at a size that takes seconds."""

import gzip
import json
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes.experiments.sparse_po_smollm2 import frozen_layers, report, run
from tests.helpers.tiny import WORDS, save_tiny_model


def write_data(folder):
    generator = np.random.default_rng(0)
    labels = [index % 2 for index in range(60)]
    texts = [" ".join([*generator.choice(WORDS[3:], size=20), *["good" if label else "bad"] * 5]) for label in labels]
    for split in ("train", "test"):
        pd.DataFrame({"text": texts, "label": labels}).to_parquet(folder / f"imdb_{split}.parquet")
    with gzip.open(folder / "pairs.jsonl.gz", "wt") as file:
        for prompt in ("the film", "a book", "the meal", "it was", "the room"):
            for reward in generator.permutation(4):
                words = ["bad hated", "dull hated", "fine liked", "great liked"][reward]
                text = f"{prompt} was {words} it"
                file.write(json.dumps({"prompt": prompt, "text": text, "reward": float(reward)}) + "\n")
    with zipfile.ZipFile(folder / "lexicon.zip", "w") as file:
        for kind, words in (("positive", "good fine great liked"), ("negative", "bad dull poor hated")):
            file.writestr(run.LEXICON.format(kind), "; comment\n" + "\n".join(words.split()))


def test_tuning_then_the_grid(tmp_path, capsys):
    write_data(tmp_path)
    out = tmp_path / "out"
    arguments = [
        "--model_name_or_path", save_tiny_model(tmp_path / "model"), "--imdb_dir", str(tmp_path),
        "--pairs_file", str(tmp_path / "pairs.jsonl.gz"), "--lexicon_file", str(tmp_path / "lexicon.zip"),
        "--betas", "0.1", "--seeds", "0", "--learning_rate_factors", "0.5", "1.0", "--num_held_out", "4",
        "--new_tokens", "4", "--prompt_words", "3", "--lora_layers", "1", "--max_steps", "1",
        "--methods", "SparsePO common", "--per_device_train_batch_size", "4", "--mask_learning_rate", "0.01",
        "--share_prompt", "True", "--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--save_strategy",
        "no", "--logging_steps", "1", "--output_dir", str(out),
    ]  # fmt: skip
    run.main(*run.make_parser().parse_args_and_config([*arguments, "--only_size", "True"]))
    assert not (out / "runs.jsonl").is_file()
    run.main(*run.make_parser().parse_args_and_config(arguments))
    assert "runs 3, tuning runs of each method 2" in " ".join(capsys.readouterr().out.split())
    *tuning, reported = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    # Tuned on a seed of its own, and reported with the factor that was best there
    assert [(row["factor"], row["seed"], row["tuning"]) for row in tuning] == [(0.5, 1, True), (1.0, 1, True)]
    assert reported["seed"] == 0 and reported["factor"] == run.best_of_tuning(tuning, 10.0)["factor"]
    assert 0 <= reported["lexicon_auc"] <= 1
    expected = f"| SparsePO common | 0.1 | {reported['factor']:g} | {reported['reward']:.3f}"
    assert expected in (out / "results.md").read_text()
    assert list((out / "token_masks" / "SparsePO_common").glob("*.png"))
    assert (out / "frontier.png").stat().st_size > 1000


def test_the_tuning_takes_no_rate_at_which_a_method_over_optimises():
    rows = [{"reward": reward, "divergence": kl} for reward, kl in ((0.7, 2.0), (0.8, 9.0), (0.99, 23.0))]
    assert run.best_of_tuning(rows, 10.0) is rows[1] and run.best_of_tuning(rows, 30.0) is rows[2]
    assert run.best_of_tuning(rows, 1.0) is rows[0]


@torch.no_grad()
def test_frozen_layers_run_once(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path))
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    ids = torch.randint(3, 12, (2, 6))
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    inputs = {"input_ids": ids, "use_cache": False}
    expected, masked = model(**inputs).logits, model(**inputs, attention_mask=mask).logits
    computed = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: computed.append(0))
    model.model.layers[1].mlp.register_forward_hook(lambda *_: computed.append(1))
    cache = frozen_layers.FrozenLayerCache()
    cache.attach(model.model.layers)
    assert torch.equal(model(**inputs).logits, expected) and torch.equal(model(**inputs).logits, expected)
    assert (computed, cache.hits) == ([0, 1, 1], 1)
    # Another mask is another input, and a call with keys and values runs as ever
    assert torch.equal(model(**inputs, attention_mask=mask).logits, masked)
    assert len(model(input_ids=ids, use_cache=True).past_key_values) == 2
    assert computed == [0, 1, 1, 0, 1, 0, 1]


def test_tokens_of_words_and_intervals():
    pieces = [" The", " film", " is", " won", "der", "ful", " and", " good", "-", "ish"]
    found = run.tokens_of_words(pieces, {"wonderful", "good"})
    assert found.tolist() == [False, False, False, True, True, True, False, False, False, False]
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.3027 / 3**0.5, rel=1e-4))
