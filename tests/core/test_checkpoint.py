"""Checkpoints as folders: whole or not there, and what is found wrong with them; the lock of a folder."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import psutil
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file

from trl_ext.core import checkpoint as files
from trl_ext.core.checkpoint import (
    checkpoints,
    clear_remains,
    fault_of,
    prune,
    publish,
    read_manifest,
    unsafe_files,
)
from trl_ext.core.checkpoint_settings import compare_settings, stated_changes, stated_settings, without_places
from trl_ext.core.files import is_lack_of_space
from trl_ext.core.run_folder import LOCK_FILE, RunLock, prepare_folder
from trl_ext.core.status import RunError


@pytest.fixture(autouse=True)
def _state():
    PartialState(cpu=True)


def fill(folder, step=1):
    folder.mkdir(parents=True)
    save_file({"weight": torch.arange(64.0)}, folder / "model.safetensors")
    torch.save({"state": {0: torch.ones(8)}}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "inner").mkdir()
    (folder / "inner" / "text.txt").write_text("a" * 100)
    return folder


def published(output, step=1, **about):
    partial = fill(output / ".saving" / f"checkpoint-{step}", step)
    publish(partial, output / f"checkpoint-{step}", {"trainer": "T", "settings": {}, **about})
    return output / f"checkpoint-{step}"


def test_a_published_checkpoint_is_whole_and_every_change_of_a_bit_is_found(tmp_path):
    whole = published(tmp_path)
    assert fault_of(whole) is None
    assert read_manifest(whole)["files"].keys() == {
        "model.safetensors", "optimizer.pt", "trainer_state.json", "inner/text.txt",
    }  # fmt: skip
    for path in [path for path in whole.rglob("*") if path.is_file()]:
        name, content = path.relative_to(whole).as_posix(), path.read_bytes()
        for position in range(0, len(content), max(1, len(content) // 7)):
            path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            assert f"{name} has changed" in fault_of(whole), position
        path.write_bytes(content[:-1])
        assert name in fault_of(whole)
        path.write_bytes(content)
        assert fault_of(whole) is None
    (whole / "optimizer.pt").unlink()
    assert fault_of(whole) == "optimizer.pt is missing"


def test_without_a_manifest_the_form_of_the_files_is_looked_at(tmp_path):
    plain = fill(tmp_path / "checkpoint-1")
    assert fault_of(plain) is None
    for name in ("optimizer.pt", "model.safetensors", "trainer_state.json"):
        path = plain / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert name in fault_of(plain)
        path.write_bytes(content)
    (plain / "model.safetensors").unlink()
    assert fault_of(plain) == "the weights are missing"
    shutil.rmtree(plain)
    plain.mkdir()
    assert fault_of(plain) == "trainer_state.json is missing"


def test_an_interrupted_save_shows_nothing(tmp_path, monkeypatch):
    first = published(tmp_path)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    partial = fill(tmp_path / ".saving" / "checkpoint-1")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        publish(partial, first, {})
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert checkpoints(tmp_path) == [first] and fault_of(first) is None
    monkeypatch.undo()
    publish(partial, first, {"trainer": "again"})
    assert read_manifest(first)["trainer"] == "again" and fault_of(first) is None
    clear_remains(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    paths = [published(tmp_path, step) for step in (9, 10, 11, 12)]
    prune(tmp_path, 2, paths[-1], str(paths[0]))
    assert checkpoints(tmp_path) == [paths[0], paths[-1]]
    prune(tmp_path, 1, paths[-1], None)
    assert checkpoints(tmp_path) == [paths[-1]]
    prune(tmp_path, None, paths[-1], None)
    assert checkpoints(tmp_path) == [paths[-1]]


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_pickles_that_run_code_are_found_and_not_run(tmp_path):
    whole, mark = published(tmp_path / "out"), tmp_path / "mark"
    assert unsafe_files(whole) == {}
    torch.save(
        {"cpu": torch.get_rng_state(), "numpy": __import__("numpy").random.get_state()}, whole / "rng_state.pth"
    )
    assert unsafe_files(whole) == {}
    torch.save([Planted(mark)], whole / "rollout_0.pt")
    (whole / "scheduler.pt").write_bytes(pickle.dumps(Planted(mark)))
    inner = whole / "inner" / ".metadata"
    inner.write_bytes(pickle.dumps(Planted(mark)))
    found = unsafe_files(whole)
    assert found.keys() == {"rollout_0.pt", "scheduler.pt", "inner/.metadata"}
    assert found["inner/.metadata"] == ["posix.system"] and "posix.system" in found["rollout_0.pt"]
    # A harmless name is pushed and taken away again, to stand for the one that is called
    for hidden in (b"\x8c\x05posix\x8c\x06system\x8c\x05torch\x8c\x04Size00\x93.", b"(S'ls'\niposix\nsystem\n."):
        inner.write_bytes(b"\x80\x04" + hidden)
        assert "inner/.metadata" in unsafe_files(whole)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_of_sharded_checkpoints_is_let_through(tmp_path):
    from torch.distributed.checkpoint import save

    save({"weight": torch.ones(4), "step": 3}, checkpoint_id=tmp_path / "sharded", no_dist=True)
    assert (tmp_path / "sharded" / ".metadata").is_file() and unsafe_files(tmp_path) == {}


@pytest.mark.parametrize(("module", "is_let_through"), [("pathlib", True), ("pathlib._local", True), ("pathl", False)])
def test_paths_of_every_python_are_let_through(module, is_let_through, tmp_path):
    (tmp_path / ".metadata").write_bytes(f"c{module}\nPosixPath\n(V.\ntR.".encode())
    assert unsafe_files(tmp_path) == ({} if is_let_through else {".metadata": [f"{module}.PosixPath"]})


def test_settings_are_compared():
    saved = {"optim": "adamp", "learning_rate": 0.1, "rewards": ["a", "b"], "gone": 1}
    own = {"optim": "adamp", "learning_rate": 0.2, "rewards": ["a", "b"], "new": 1}
    changes = compare_settings(saved, own, ("optim", "rewards"), "checkpoint-3")
    assert changes == {"learning_rate": (0.1, 0.2)} and stated_changes(changes) == "`learning_rate` is 0.2 (was 0.1)"
    with pytest.raises(RunError, match=r"checkpoint-3.*`rewards` is \['b', 'a'\] here and was \['a', 'b'\]"):
        compare_settings(saved, {**own, "rewards": ["b", "a"]}, ("optim", "rewards"), "checkpoint-3")


def test_no_secret_and_no_place_of_this_machine_is_stated(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setenv("WANDB_API_KEY", "key_12345678")
    args = TrainingArguments(
        str(tmp_path), hub_token="hf_secret", report_to="none", use_cpu=True, optim_args="a=1",
        lr_scheduler_kwargs={"api_key": "hf_secret", "power": 2},
    )  # fmt: skip
    more = {
        "rewards": ["a", f"{tmp_path}/models/rm"], f"threshold of {tmp_path}/rm": {"gt": "hf_secret or key_12345678"},
        "template": f"file={tmp_path}/a.jinja,n=1", "seed": None, "hub": "https://a.b/c/d", "own": "a/b/c",
        "or": "x/y",
    }  # fmt: skip
    stated = stated_settings(args, more)
    text = json.dumps(stated)
    assert "secret" not in text and "key_12345678" not in text and "seed" not in stated
    assert str(tmp_path) not in text and tmp_path.parent.name not in text
    assert stated["rewards"][1].endswith(">/rm") and stated["template"].endswith(">/a.jinja,n=1")
    assert (stated["hub"], stated["own"], stated["or"]) == ("https://a.b/c/d", "a/b/c", "x/y")
    assert without_places(stated) == stated  # so that manifests of both kinds are compared
    assert without_places("/my own/two words/a b.txt").endswith(">/a b.txt")
    others = [without_places(f"{folder}/rm") for folder in ("/a", "/a", "/b")]
    assert others[0] == others[1] != others[2]
    assert stated["lr_scheduler_kwargs"] == {"power": 2} and stated["rewards"][0] == "a"
    assert stated["average_tokens_across_devices"] is not None


def test_one_run_for_a_folder(tmp_path):
    lock = RunLock(tmp_path / "out")
    lock.acquire()
    with pytest.raises(RunError, match=f"another run, process {os.getpid()} on"):
        RunLock(tmp_path / "out").acquire()
    lock.release()
    assert list((tmp_path / "out").iterdir()) == []
    again = RunLock(tmp_path / "out")
    again.acquire()
    lock.release()  # which is not its own any more
    assert (tmp_path / "out" / LOCK_FILE).exists()
    again.release()


def test_locks_of_the_dead_are_taken_over(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    own = {"host": os.uname().nodename, "pid": os.getpid(), "started": psutil.Process().create_time(), "id": "x"}
    for holder in (
        {**own, "pid": dead.pid}, {**own, "started": own["started"] - 100}, {**own, "host": "elsewhere"}, [],
    ):  # fmt: skip
        (tmp_path / LOCK_FILE).write_text(json.dumps(holder))
        lock = RunLock(tmp_path, patience=0.1)
        lock.acquire()
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_another_machine_is_left_alone(tmp_path):
    holder = RunLock(tmp_path, beat=0.02)
    holder._own["host"] = "elsewhere"
    holder.acquire()
    with pytest.raises(RunError, match="on elsewhere"):
        RunLock(tmp_path, patience=5.0).acquire()
    holder.release()


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written to.*Choose another"):
        RunLock(tmp_path / "file" / "out").acquire()


def test_a_folder_has_one_history(tmp_path):
    first, second = published(tmp_path, 1), published(tmp_path, 2)
    prepare_folder(tmp_path, second, False)
    with pytest.raises(RunError, match="checkpoints of another run: checkpoint-1, checkpoint-2.*overwrite"):
        prepare_folder(tmp_path, None, False)
    with pytest.raises(RunError, match="do not come before .*checkpoint-1: checkpoint-2"):
        prepare_folder(tmp_path, first, False)
    prepare_folder(tmp_path, first, False, [second])
    prepare_folder(tmp_path, first, True)
    assert checkpoints(tmp_path) == [first]
    prepare_folder(tmp_path, None, True)
    assert checkpoints(tmp_path) == []


def test_full_disks_are_told_from_other_faults():
    assert is_lack_of_space(OSError(28, "x")) and not is_lack_of_space(OSError(5, "x"))
    assert is_lack_of_space(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"))
    assert is_lack_of_space(RuntimeError("basic_ios::clear: iostream error"))  # of torch's writer, at its end
    assert not is_lack_of_space(RuntimeError("shapes differ"))
