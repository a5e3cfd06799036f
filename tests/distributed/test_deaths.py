"""One of two processes dies: the other ends at once and says which, and what was half written is not gone on from."""

from pathlib import Path

import pytest

from tests.helpers.launching import fork_server, rank_environments, run
from tests.helpers.tiny import save_tiny_model
from trl_ext.core.checkpoint import SAVING, checkpoints, fault_of


pytestmark = pytest.mark.distributed
LINE = str(Path(__file__).with_name("train_line.py"))
PPO = str(Path(__file__).with_name("train_ppo.py"))


def end_of(argv, folder):
    """Exit status of the first process that failed, and what each has written to the standard error."""
    folder.mkdir()
    status, _, _ = fork_server().run([str(part) for part in argv], rank_environments(2), folder)
    return status, [(folder / f"stderr_{rank}.log").read_text() for rank in (0, 1)]


def test_a_process_that_is_killed_while_it_saves(tmp_path):
    output = tmp_path / "out"
    status, (first, _) = end_of([LINE, "--output", output, "--killed_rank", "1"], tmp_path / "logs")
    assert status != 0 and "RunError: rank 1 (process " in first and "has ended, and rank 0 cannot go on" in first
    assert [path.name for path in checkpoints(output)] == ["checkpoint-1", "checkpoint-2"]
    assert not any(map(fault_of, checkpoints(output))) and (output / SAVING / "checkpoint-3").is_dir()
    whole = run("ddp", LINE, "none", tmp_path / "whole")
    resumed = run("ddp", LINE, "none", output, "--resume", "true")
    assert resumed["losses"] == whole["losses"] and resumed["weights"] == whole["weights"]
    assert not (output / SAVING).exists()


def test_a_process_that_is_silent_is_waited_for_as_long_as_was_said(tmp_path):
    argv = [LINE, "--output", tmp_path / "out", "--silent_rank", "1", "--settings", '{"ddp_timeout": 6}']
    status, (first, _) = end_of(argv, tmp_path / "logs")
    assert status == 1 and "RunError: Rank 0 got no answer" in first and "at most `ddp_timeout` = 6 s" in first
    assert "Look at rank 1 (process " in first
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-1", "checkpoint-2"]


def test_a_process_with_fewer_rows_ends_with_the_others(tmp_path):
    # Of 5 rows in pairs, one process has two batches and the other one
    found = run("ddp", LINE, "none", tmp_path, "--rows", "5", "--settings", '{"max_steps": 5}')
    assert found["errors"] == [None, None] and found["step"] == 5 and found["weights"][0] == found["weights"][1]


def test_a_reward_that_raises_on_one_process(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    options = ["--model", model, "--output", tmp_path / "out", "--batch_size", "4", "--reward_raises_on", "1"]
    status, (first, second) = end_of([PPO, *options], tmp_path / "logs")
    assert status != 0 and "ZeroDivisionError: the reward of this rank" in second
    assert "RunError: rank 1 (process " in first and "has ended" in first
    assert checkpoints(tmp_path / "out") == []
