"""Checkpoints of two processes: whole on both or not there, and taken up by one, by two, or refused on both."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.launching import run
from tests.helpers.tiny import save_tiny_model
from trl_ext.core.checkpoint import MANIFEST_FILE, checkpoints, fault_of, read_manifest


pytestmark = pytest.mark.distributed
LINE = str(Path(__file__).with_name("train_line.py"))
PPO = str(Path(__file__).with_name("train_ppo.py"))


def line(launcher, output, *options):
    return run(launcher, LINE, "none", output, *options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, line("ddp", folder)


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    return tmp_path / "out"


def test_two_processes_save_and_resume_as_one_run(whole, folder):
    newest = folder / "checkpoint-4"
    files = read_manifest(newest)["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= files.keys() and fault_of(newest) is None
    assert read_manifest(newest)["world_size"] == 2
    (newest / "rng_state_1.pth").unlink()
    os.truncate(folder / "checkpoint-3" / "optimizer.pt", 100)
    found = line("ddp", folder, "--resume", "true")
    assert found["losses"] == whole[1]["losses"] and found["weights"] == whole[1]["weights"]
    (newest / "rng_state_1.pth").unlink()
    found = line("ddp", folder, "--resume", str(newest))
    assert len(set(found["errors"])) == 1 and "rng_state_1.pth is missing" in found["errors"][0]


def test_a_full_disk_of_one_process_costs_the_checkpoint_of_both(whole, tmp_path):
    found = line("ddp", tmp_path, "--full_disk_of_rank", "1")
    assert found["losses"] == whole[1]["losses"] and found["errors"] == [None, None]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


def test_another_number_of_processes_goes_on(whole, folder, tmp_path):
    settings = json.dumps({"max_steps": 6})
    found = line("single", folder, "--resume", "true", "--settings", settings)
    assert found["errors"] == [None] and found["step"] == 6
    assert found["losses"][:4] == whole[1]["losses"]
    found = line("ddp", folder, "--resume", "true", "--settings", json.dumps({"max_steps": 8}))
    assert found["errors"] == [None, None] and found["step"] == 8
    assert torch.tensor(found["weights"][0]).equal(torch.tensor(found["weights"][1]))


def test_an_open_rollout_never_leaves_a_process_waiting(tmp_path):
    """Without the file of one process, or in another number of them, all generate anew."""
    model = save_tiny_model(tmp_path / "model")
    run("ddp", PPO, model, tmp_path / "two", "--batch_size", "4")
    checkpoint = tmp_path / "two" / "checkpoint-3"
    assert (checkpoint / "rollout_1.pt").is_file()
    resume = ("--resume", str(checkpoint))
    found = run("single", PPO, model, tmp_path / "one", "--batch_size", "4", *resume)
    assert len(found["loss"]) == 4 and found["world_size"] == 1
    (checkpoint / "rollout_1.pt").unlink()
    (checkpoint / MANIFEST_FILE).unlink()
    found = run("ddp", PPO, model, tmp_path / "again", "--batch_size", "4", *resume)
    assert len(found["loss"]) == 4 and found["states"][0] == found["states"][1]
