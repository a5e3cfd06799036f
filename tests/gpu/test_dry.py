"""The script that gathers evidence on a GPU, in its dry mode."""

import json
import math
import subprocess
import sys

import pytest

from tests.gpu.run import SECTIONS, main


# What each section must have measured: a table whose name starts so, and a column of numbers
NUMBERS = {
    "environment": ("rates", "value"),
    "kernels": ("optimizers", "error"),
    "optimizers": ("AdamP over", "ratio"),
    "paired_head": ("paired head", "ms"),
    "sparse_po": ("SparsePO step", "over_dpo"),
    "equilibrium": ("forward and backward", "ratio"),
    "fsdp2": ("FSDP2", "error"),
    "large_tensor": ("more than", "error"),
    "ppo": ("ConstrainedPPO", "ratio"),
    "sanitizer": ("compute-sanitizer", "returncode"),
}


def test_every_section_ends_with_its_numbers(tmp_path):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.run", "--dry", "--output_dir", str(tmp_path), "--seconds", "900"],
        capture_output=True, text=True, timeout=1000,
    )  # fmt: skip
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0, (done.stderr[-2000:], {name: row["log"][-2000:] for name, row in results.items()})
    assert list(results) == list(SECTIONS) == list(NUMBERS)
    for name, (table, column) in NUMBERS.items():
        tables = results[name]["tables"]
        rows = next(rows for title, rows in tables.items() if title.startswith(table))
        assert rows and all(math.isfinite(row[column]) for row in rows), (name, rows)
        for row in (row for rows in tables.values() for row in rows):
            assert "error" not in row or not isinstance(row["error"], str), (name, row)
            assert row.get("agrees", "yes") == "yes", (name, row)
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}\n\nok" in text for name in SECTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "gpu.log"}


def test_what_does_not_fit_is_reported_as_not_run(tmp_path, monkeypatch, capsys):
    command = ["run", "--dry", "--output_dir", str(tmp_path), "--only", "environment,sanitizer", "--seconds", "1"]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 1
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["status"] for row in results.values()] == ["not run", "not run"]


def test_a_section_that_hangs_is_stopped_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(SECTIONS, "kernels", SECTIONS["kernels"]._replace(limit=1))
    command = ["run", "--dry", "--output_dir", str(tmp_path), "--only", "kernels,environment"]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 1
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["status"] for row in results.values()] == ["stopped after 4 s", "ok"]
