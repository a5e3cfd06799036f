"""The experiment behind docs/results/equilibrium_depth.md, at a size that takes seconds."""

import gzip

import numpy as np
import pytest
import torch

from recipes.experiments.equilibrium_depth.run import ARMS, DepthArguments, main, perceptron, table
from trl_ext import EPHead


def write_digits(folder, count=40):
    generator = np.random.default_rng(0)
    for name, header, values in (
        ("images", 16, generator.integers(0, 256, (count, 28, 28))), ("labels", 8, np.arange(count) % 10),
    ):  # fmt: skip
        with gzip.open(folder / f"mnist_t10k_{name}.gz", "wb") as file:
            file.write(bytes(header) + values.astype(np.uint8).tobytes())


def test_runs_are_kept_and_reported(tmp_path):
    write_digits(tmp_path)
    args = DepthArguments(
        str(tmp_path), depths=[2, 3], seeds=[0], width=8, epochs=1, batch_size=16, output_dir=str(tmp_path / "out")
    )
    main(args)
    kept = (tmp_path / "out" / "runs.jsonl").read_text()
    assert len(kept.splitlines()) == 2 * len(ARMS)
    results = (tmp_path / "out" / "results.md").read_text()
    assert all(results.count(f"| {arm} |") >= 2 for arm in ARMS) and "| 2 layers | 3 layers |" in results
    assert (tmp_path / "out" / "results.png").stat().st_size > 1000
    main(args)  # nothing is run again
    assert (tmp_path / "out" / "runs.jsonl").read_text() == kept


def test_table_has_means_and_deviations():
    rows = [{"arm": "a", "depth": 2, "seed": seed, "accuracy": 90.0 + 2 * seed} for seed in (0, 1)]
    rows += [{"arm": "b", "depth": 3, "seed": 0, "accuracy": 80.0}]
    lines = table(rows, "accuracy").splitlines()
    assert lines[2:] == ["| a | 91.0 ± 1.4 |  |", "| b |  | 80.0 |"]


def test_perceptron_has_the_layers_of_the_head():
    head = EPHead(20, [8] * 3, 10)
    found = [tuple(weight.shape) for weight in perceptron(20, 8, 3).parameters() if weight.dim() == 2]
    expected = ("input_weight", "forward_weight_1", "forward_weight_2", "readout_weight")
    assert found == [tuple(getattr(head, name).shape) for name in expected]
    torch.testing.assert_close(torch.linalg.svdvals(perceptron(20, 8, 3)[2].weight), torch.ones(8))


def test_an_unknown_arm():
    with pytest.raises(ValueError, match="`arms` has .'transformer'.; the experiment knows"):
        DepthArguments("", arms=["transformer"])
