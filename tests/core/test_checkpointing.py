"""What a trainer saves and resumes from, on the smallest model there is; the commands stand in tests/faults."""

import errno
import json
import logging
import os
import shutil
import signal

import pytest
import torch
from transformers import TrainerCallback

from tests.helpers.line import LineTrainer, make
from trl_ext.core import checkpointing
from trl_ext.core.checkpoint import MANIFEST_FILE, checkpoints, fault_of, read_manifest
from trl_ext.core.run_arguments import RunArguments
from trl_ext.core.status import REQUEUE_STATUS, STATUS_FILE_VARIABLE, RunError


def train(folder, resume=None, **settings):
    trainer = make(folder, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(one, other):
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (one, other)]
    return losses[0] == losses[1] and torch.equal(one.model.line.weight, other.model.line.weight)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path):
    """The checkpoints of a run, to be damaged."""
    shutil.copytree(whole.args.output_dir, tmp_path / "out")
    return tmp_path / "out"


def test_every_checkpoint_is_whole_and_says_what_made_it(whole, folder):
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert not any(fault_of(path) for path in checkpoints(folder))
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    manifest = read_manifest(folder / "checkpoint-3")
    assert (manifest["world_size"], manifest["engine"], manifest["step"]) == (1, "plain", 3)
    assert manifest["settings"]["learning_rate"] == 0.01 and manifest["ended"] is None


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", MANIFEST_FILE])
def test_the_newest_whole_checkpoint_is_taken(name, whole, folder, caplog):
    for step in (3, 4):
        os.truncate(folder / f"checkpoint-{step}" / name, 9)
    with caplog.at_level(logging.WARNING):
        resumed = train(folder, True)
    assert same(resumed, whole)
    assert f"checkpoint-4 is passed over: {name}" in caplog.text and "goes on from checkpoint-2" in caplog.text
    assert not any(fault_of(path) for path in checkpoints(folder))  # what was damaged is written anew


def test_a_damaged_path_is_refused_with_the_last_whole_one(folder):
    (folder / "checkpoint-4" / "scheduler.pt").unlink()
    with pytest.raises(
        RunError, match="checkpoint-4 is damaged: scheduler.pt is missing.*whole one is .*checkpoint-3"
    ):
        train(folder, str(folder / "checkpoint-4"))
    for path in checkpoints(folder):
        (path / "trainer_state.json").write_text("{")
    with pytest.raises(
        RunError, match="No checkpoint of .* is whole: checkpoint-4: scheduler.pt.*checkpoint-1: train"
    ):
        train(folder, True)


def test_checkpoints_without_a_manifest_are_accepted_with_one_line(whole, folder, caplog):
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "checkpoint-3" / MANIFEST_FILE).unlink()
    with caplog.at_level(logging.WARNING):
        assert same(train(folder, True), whole)
    assert caplog.text.count(MANIFEST_FILE) == 1 and "begins anew" not in caplog.text
    shutil.rmtree(folder / "checkpoint-4")
    for name in (MANIFEST_FILE, "optimizer.pt"):
        (folder / "checkpoint-3" / name).unlink(missing_ok=True)
    with caplog.at_level(logging.WARNING):
        train(folder, True)
    assert "no optimizer.pt, so that what these hold begins anew" in caplog.text


def full_at(monkeypatch, step, trainer):
    save = torch.save

    def refusing(state, path, *args, **kwargs):
        if trainer.state.global_step == step and str(path).endswith("optimizer.pt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", refusing)


def test_a_full_disk_costs_one_checkpoint(whole, tmp_path, monkeypatch, caplog):
    trainer = make(tmp_path, save_total_limit=1)
    full_at(monkeypatch, 3, trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert same(trainer, whole) and [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]
    assert "No checkpoint was saved at step 3: the disk is full, about 1 MB more are needed" in caplog.text
    trainer = make(tmp_path / "stop", run=RunArguments(full_disk="stop"))
    full_at(monkeypatch, 2, trainer)
    with pytest.raises(RunError, match="step 2: the disk is full.*Make room"):
        trainer.train()
    assert [path.name for path in (tmp_path / "stop").iterdir()] == ["checkpoint-1"]


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, monkeypatch, caplog):
    trainer = make(tmp_path, max_steps=2)
    trainer._last_size = 3 * 2**20
    monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 2**20))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert checkpoints(tmp_path) == [] and "about 2 MB more are needed" in caplog.text


def test_a_writer_that_does_not_say_what_failed_is_judged_by_the_disk(whole, tmp_path, monkeypatch, caplog):
    trainer, save = make(tmp_path), torch.save

    def refusing(state, path, *args, **kwargs):
        if trainer.state.global_step == 3 and str(path).endswith("optimizer.pt"):
            monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
            raise RuntimeError("stream")
        save(state, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", refusing)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert same(trainer, whole) and [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert "No checkpoint was saved at step 3: the disk is full" in caplog.text


def test_what_fails_otherwise_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="saved at step 1: RuntimeError: shapes differ"):
        make(tmp_path / "other").train()
    monkeypatch.undo()
    monkeypatch.setattr(LineTrainer, "_save_scaler", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    trainer = make(tmp_path)
    with pytest.raises(RuntimeError, match="saved at step 1: OSError.*broken"):
        trainer.train()
    assert checkpoints(tmp_path) == []


def test_what_may_change_is_applied_and_listed(folder, caplog):
    for step in (3, 4):
        shutil.rmtree(folder / f"checkpoint-{step}")
    with caplog.at_level(logging.WARNING):
        resumed = train(folder, True, learning_rate=0.5, weight_decay=0.25, max_steps=10, save_steps=5)
    rates = [entry["learning_rate"] for entry in resumed.state.log_history if "learning_rate" in entry]
    assert rates[2:] == pytest.approx([0.5 * (10 - step) / 10 for step in range(2, 10)])
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.25, 0.0}
    assert [path.name for path in checkpoints(folder)][-2:] == ["checkpoint-5", "checkpoint-10"]
    assert "`learning_rate` is 0.5 (was 0.01)" in caplog.text and "`max_steps` is 10 (was 4)" in caplog.text


def test_what_may_not_change_is_refused(folder):
    with pytest.raises(RunError, match="checkpoint-4.*`optim` is 'sgd' here and was 'adamw"):
        train(folder, True, optim="sgd")


def test_a_run_that_had_ended_stays_ended(whole, folder, caplog):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with caplog.at_level(logging.WARNING):
        again = train(folder, True)
    assert same(again, whole) and again.state.global_step == 4 and "had ended at step 4" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    assert train(folder, True, max_steps=5).state.global_step == 5


def test_a_folder_of_another_run_is_refused(whole, folder):
    with pytest.raises(RunError, match="has the checkpoints of another run"):
        train(folder)
    assert same(train(folder, run=RunArguments(overwrite=True)), whole)
    trainer = make(folder.parent / "twice")
    trainer.train()
    trainer.train()  # the same run again


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_planted_pickles_are_refused_unread(whole, folder, tmp_path):
    mark, checkpoint = tmp_path / "mark", folder / "checkpoint-3"
    shutil.rmtree(folder / "checkpoint-4")
    (checkpoint / MANIFEST_FILE).unlink()  # who plants a file writes the manifest anew, or leaves it out
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin"):
        kept = (checkpoint / name).read_bytes() if (checkpoint / name).exists() else None
        torch.save(Planted(mark), checkpoint / name)
        with pytest.raises(RunError, match=f"{name} names posix.system, which no checkpoint is made of"):
            train(folder, True)
        (checkpoint / name).unlink()
        if kept is not None:
            (checkpoint / name).write_bytes(kept)
    torch.save(Planted(mark), checkpoint / "training_args.bin")  # which nothing reads
    assert same(train(folder, True), whole) and not mark.exists()


class Told(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_run_told_to_end_saves_and_says_that_it_is_to_be_started_again(whole, tmp_path, monkeypatch):
    monkeypatch.setenv(STATUS_FILE_VARIABLE, str(tmp_path / "status"))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "out", run=RunArguments(save_on_signal=True), callbacks=[Told()], save_steps=100)
    assert ended.value.code == REQUEUE_STATUS == int((tmp_path / "status").read_text())
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert same(train(tmp_path / "out", True, run=RunArguments(save_on_signal=True), save_steps=100), whole)


def test_the_best_checkpoint_is_kept_under_its_name(tmp_path):
    class Judged(LineTrainer):
        def evaluate(self, *args, **kwargs):
            return {"eval_loss": 1.0 + abs(self.state.global_step - 2)}

    settings = {"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make(tmp_path, **settings)
    trainer.__class__ = Judged
    trainer.train()
    assert trainer.state.best_model_checkpoint == os.path.join(str(tmp_path), "checkpoint-2")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint
