"""The comparison of two versions' numbers sees one changed bit, and nothing where nothing changed."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.same_numbers import CASES, compare, flatten, folder_contents, main, record


CASE = "^sgdp/default$"


@pytest.fixture(scope="module")
def recorded():
    return record(CASE)


def test_a_case_repeats_bit_by_bit(recorded):
    assert any(name.endswith("model/conv.weight") for name in recorded)
    assert compare(recorded, record(CASE)) == []


def test_cases_are_known_by_method():
    assert {name.split("/")[0] for name in CASES} == {
        "sparse_po", "constrained_ppo", "adamp", "sgdp", "optim", "head", "ep_reward", "ep_classifier",
    }  # fmt: skip


def test_compare_names_what_differs(recorded, tmp_path, capsys):
    changed = dict(recorded)
    loss = float.fromhex(changed["sgdp/default/losses/3"])
    changed["sgdp/default/losses/3"] = float.hex(torch.tensor(loss).nextafter(torch.tensor(9.0)).item())
    missing, added = "sgdp/default/model/out.bias", "sgdp/default/model/out.extra"
    changed[added] = changed.pop(missing)
    for name, entries in (("first", recorded), ("second", changed)):
        (tmp_path / name).write_text(json.dumps(entries))
    assert main(["compare", str(tmp_path / "first"), str(tmp_path / "first")]) == 0
    assert capsys.readouterr().out.startswith("0 of ")
    assert main(["compare", str(tmp_path / "first"), str(tmp_path / "second")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"only in the first: {missing}" and lines[1] == f"only in the second: {added}"
    assert lines[2].startswith("differs: sgdp/default/losses/3: 0x1.") and lines[3].startswith("3 of ")
    assert main(["compare", str(tmp_path / "first"), str(tmp_path / "second"), "--only", "report"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(tmp_path / "first"), str(tmp_path / "second"), "--only", "no such entry"])


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_one_bit_of_a_saved_tensor(suffix, tmp_path):
    save = save_file if suffix == "safetensors" else torch.save
    found = []
    for value in (torch.ones(3), torch.ones(3), torch.ones(3).nextafter(torch.tensor([1.0, 2.0, 1.0]))):
        save({"weight": value, "other": torch.zeros(2)}, tmp_path / f"file.{suffix}")
        found.append(folder_contents(tmp_path))
    assert compare(found[0], found[1]) == []
    (line,) = compare(found[0], found[2])
    assert line.startswith(f"differs: file.{suffix}/") and "/weight: " in line


def test_exact_and_without_time():
    log = {"loss": 0.1, "train_runtime": 3.2, "step_time": 1.0, "eval_steps_per_second": 2.0, "completions/mean": 3}
    assert flatten([log]) == {
        "0/keys": ["completions/mean", "loss"],
        "0/loss": (0.1).hex(),
        "0/completions/mean": 3,
    }
    assert flatten({"x": torch.zeros(2)})["x"] != flatten({"x": torch.zeros(2, 1)})["x"]
    assert flatten({"x": -0.0})["x"] != flatten({"x": 0.0})["x"]
    with pytest.raises(TypeError, match="`x/y` is a `object`"):
        flatten({"x": {"y": object()}})
