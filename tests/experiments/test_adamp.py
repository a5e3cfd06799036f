"""The experiments behind docs/results/adamp.md, at a size that takes seconds."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recipes.experiments.adamp_language_models import run as language_models
from recipes.experiments.adamp_language_models.run import (
    LanguageModelArguments,
    Run,
    best_learning_rate,
    differences,
    table,
)
from recipes.experiments.adamp_radial_family import run as radial_family
from recipes.experiments.adamp_scale_invariance import run as scale_invariance
from tests.helpers.tiny import WORDS, tiny_tokenizer


def write_texts(folder, num_words=60):
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS[3:], size=num_words)) for _ in range(80)]
    pd.DataFrame({"text": texts}).to_parquet(folder / "imdb_unsup.parquet")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")


def test_language_models(tmp_path):
    write_texts(tmp_path)
    args = LanguageModelArguments(
        str(tmp_path), str(tmp_path / "tokenizer"), learning_rates=[0.001, 0.01], seeds=[0], max_steps=4,
        batch_size=2, block_size=16, hidden_size=16, num_layers=1, warmup_steps=1, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    language_models.main(args)
    kept = (tmp_path / "out" / "runs.jsonl").read_text()
    assert len(kept.splitlines()) == 3 * 2 * 2
    results = (tmp_path / "out" / "results.md").read_text()
    for title in ("Llama-like", "Qwen3-like", "Gemma-3-like"):
        assert f"| {title} | AdamP |" in results
    assert (tmp_path / "out" / "results.png").stat().st_size > 1000
    language_models.main(args)  # Nothing is run again
    assert (tmp_path / "out" / "runs.jsonl").read_text() == kept


def test_wrong_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`families` has \\['bert'\\]; the experiment knows"):
        LanguageModelArguments("", "", families=["bert"])
    with pytest.raises(ValueError, match="`optimizers` has \\['Adam'\\]"):
        LanguageModelArguments("", "", optimizers=["Adam"])


def run(optimizer, rate, seed, tuning, test):
    return Run("llama", optimizer, rate, seed, tuning, test, 1.0, 0.1, 0.0)


def test_each_optimizer_is_reported_at_its_own_best_rate():
    """AdamP is best at 0.1 on the tuning text (means 2.5 and 2.0), AdamW at 0.01, where 0.1 diverged."""
    runs = [
        run("AdamW", 0.01, 0, 2.0, 3.0), run("AdamW", 0.01, 1, 2.2, 3.2), run("AdamW", 0.1, 0, float("nan"), 9.0),
        run("AdamW", 0.1, 1, 1.0, 9.0), run("AdamP", 0.01, 0, 2.5, 1.0), run("AdamP", 0.01, 1, 2.5, 1.0),
        run("AdamP", 0.1, 0, 2.0, 2.9), run("AdamP", 0.1, 1, 2.0, 3.3),
    ]  # fmt: skip
    assert best_learning_rate([r for r in runs if r.optimizer == "AdamW"]) == 0.01
    assert best_learning_rate([r for r in runs if r.optimizer == "AdamP"]) == 0.1
    lines = table(runs).splitlines()
    assert lines[2].startswith("| Llama-like | AdamW | 0.01 | 3.100 ± 0.141 |")
    assert lines[3].startswith("| Llama-like | AdamP | 0.1 | 3.100 ± 0.283 | -0.100, +0.100 |")
    assert differences(runs).splitlines()[2] == "| Llama-like | -2.000, -2.200 | -6.100, -5.700 |"


def test_scale_invariance(tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (8100, 28, 28), dtype=np.uint8)
    labels = generator.integers(0, 10, 8100, dtype=np.uint8)
    for name, values, header in (("images", pixels, 16), ("labels", labels, 8)):
        with gzip.open(tmp_path / f"mnist_t10k_{name}.gz", "wb") as file:
            file.write(bytes(header) + values.tobytes())
    args = scale_invariance.ScaleInvarianceArguments(
        str(tmp_path), seeds=[0], epochs=1, schedules=["cosine"], sgd_learning_rates=[0.1],
        adam_learning_rates=[0.003], toy_steps=20, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    scale_invariance.main(args)
    results = (tmp_path / "out" / "results.md").read_text()
    for name in scale_invariance.OPTIMIZERS:
        assert results.count(f"| {name} |") == 2
    assert (tmp_path / "out" / "results.png").stat().st_size > 1000


def test_radial_family(tmp_path):
    write_texts(tmp_path)
    args = radial_family.RadialFamilyArguments(
        str(tmp_path), str(tmp_path / "tokenizer"), families=["llama"], methods=["AdamW", "AdamH"], test_seeds=[1, 2],
        max_steps=2, batch_size=2, block_size=16, hidden_size=16, num_layers=1, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    radial_family.main(args)
    kept = (tmp_path / "out" / "runs.jsonl").read_text()
    assert len(kept.splitlines()) == 2 * 6 + 2 * 2
    results = (tmp_path / "out" / "results.md").read_text()
    assert results.count("| Llama-like | AdamH |") == 1 + 2
    radial_family.main(args)  # Nothing is run again
    assert (tmp_path / "out" / "runs.jsonl").read_text() == kept


def test_every_method_of_the_radial_family_is_tuned_at_the_same_cost():
    assert {len(m.learning_rates) * len(m.values) for m in radial_family.METHODS.values()} == {6}
    with pytest.raises(ValueError, match="`test_seeds` has \\[0\\], which settings are chosen on"):
        radial_family.RadialFamilyArguments("", "", test_seeds=[0, 1])
    with pytest.raises(ValueError, match="`methods` has \\['Adam'\\]"):
        radial_family.RadialFamilyArguments("", "", methods=["Adam"])


def test_table_of_the_radial_family():
    """AdamO is best at (0.03, 0.1) on the tuning seed; its test losses are 0.1 and 0.3 below AdamW's."""

    def one(method, rate, value, seed, tuning, test):
        return radial_family.Run("llama", method, rate, value, seed, tuning, test, 1.0)

    tuning = [
        one("AdamW", 0.01, 0.1, 0, 2.0, 9.0), one("AdamO", 0.01, 0.1, 0, 3.0, 1.0),
        one("AdamO", 0.03, 0.1, 0, 2.5, 1.0), one("AdamO", 0.03, 1.0, 0, float("nan"), 1.0),
    ]  # fmt: skip
    tested = [
        one("AdamW", 0.01, 0.1, 1, 0.0, 3.0), one("AdamW", 0.01, 0.1, 2, 0.0, 3.4),
        one("AdamO", 0.03, 0.1, 1, 0.0, 2.9), one("AdamO", 0.03, 0.1, 2, 0.0, 3.1),
    ]  # fmt: skip
    lines = radial_family.table(tuning, tested).splitlines()
    assert lines[2] == "| Llama-like | AdamW | 0.01 | weight_decay 0.1 | 3.200 ± 0.283 |  |  |"
    assert lines[3] == "| Llama-like | AdamO | 0.03 | weight_decay 0.1 | 3.000 ± 0.141 | -0.200 | -0.100, -0.300 |"


def test_the_page_has_the_tables_of_the_kept_runs():
    results = Path(__file__).parents[2] / "docs" / "results"
    with gzip.open(results / "adamp_radial_family_runs.jsonl.gz", "rt") as file:
        runs = [radial_family.Run(**json.loads(line)["run"]) for line in file]
    tuning, tested = ([run for run in runs if (run.seed == 0) == chosen] for chosen in (True, False))
    assert len(tuning) == 3 * 5 * 6 and len(tested) == 3 * 5 * 5
    page = (results / "adamp.md").read_text()
    assert radial_family.table(tuning, tested) in page and radial_family.grid(tuning) in page
