"""The demo's work: several pieces at a time, each part shown when it is done, what is said kept in logs."""

import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from trl_ext import demo, playground
from trl_ext.demo import pipeline as demo_pipeline
from trl_ext.demo import work as demo_work
from trl_ext.demo.work import Part, Task, default_workers, run_parts


def parts_of(folder, shown):
    """Two parts whose tasks any process can run."""
    first = [
        Task("threads", folder / "a.log", os.getenv, ("OMP_NUM_THREADS",)),
        Task("pid", folder / "b.log", os.getpid),
    ]
    second = [Task("words", folder / "c.log", os.system, ("echo said by a child",))]
    return [Part("First", first, shown.append), Part("Second", second, shown.append)]


@pytest.mark.parametrize("workers", [1, 2])
def test_parts_are_shown_with_their_results_in_order(workers, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXT_VERBOSE", "1")  # nothing to keep quiet, and nothing to import for that
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    shown, said = [], []
    run_parts(parts_of(tmp_path, shown), workers, said.append)
    by_length = {len(results): results for results in shown}
    threads, pid = by_length[2]
    assert by_length[1] == [0]
    assert (threads, pid == os.getpid()) == (("7", True) if workers == 1 else ("1", False))
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert (tmp_path / "c.log").read_text() == "said by a child\n"
    assert sorted(line.split(",")[0] for line in said) == ["First: pid", "First: threads", "Second: words"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_names_its_log(workers, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXT_VERBOSE", "1")
    part = Part("Part", [Task("listing", tmp_path / "x.log", os.listdir, (str(tmp_path / "nowhere"),))], print)
    with pytest.raises(RuntimeError, match=r"listing of the demo failed with FileNotFoundError.*x\.log"):
        run_parts([part], workers, print)


def test_one_training_for_each_core():
    assert 1 <= default_workers() <= 4


def test_pipeline_part(tmp_path, monkeypatch):
    commands = []

    def run(command, check):
        commands.append(command)
        (tmp_path / "pipeline" / "stages").mkdir(parents=True)
        for name in ("sft", "reward"):
            path = tmp_path / "pipeline" / "stages" / f"{name}.json"
            path.write_text(json.dumps({"seconds": 12.4}))
            os.utime(path, (1, 1 if name == "sft" else 2))

    monkeypatch.setattr(subprocess, "run", run)
    console = Console(record=True, width=100)
    part = demo_pipeline.pipeline_part(tmp_path / "pipeline", console, max_steps=3)
    part.show([task.function(*task.arguments) for task in part.tasks])
    assert commands[0][:4] == [sys.executable, "-m", "trl_ext.cli", "pipeline"]
    assert commands[0][-2:] == ["--stages.sft.settings.max_steps=3", "--stages.reward.settings.max_steps=3"]
    said = console.export_text()
    assert said.index("sft") < said.index("reward") and "12" in said and "report.html" in said


@pytest.mark.parametrize(
    ("asked", "models"),
    [
        (list(demo.PARTS), ["playground", "playground-small"]),
        (["sparse_po"], ["playground"]),
        (["pipeline", "equilibrium"], ["playground-small"]),
    ],
)
def test_base_models_are_trained_first_and_no_others(asked, models, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(demo_work, "run_parts", lambda parts, workers, say: ran.extend(parts))
    assert demo.main(["--output_dir", str(tmp_path), "--parts", *asked, "--workers", "2"]) == 0
    assert len(ran) == len(asked) + 1
    assert [task.arguments for task in ran[0].tasks] == [(name,) for name in models]
    assert {task.function for task in ran[0].tasks} == {playground.resolve}


def test_wrong_number_of_workers(tmp_path):
    with pytest.raises(ValueError, match="`--workers 0` must be at least 1"):
        demo.main(["--output_dir", str(tmp_path), "--workers", "0"])
