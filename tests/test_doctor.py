"""`trl-ext doctor` says what is at fault, and how to mend it."""

import importlib.metadata
import logging
import shutil
from collections import namedtuple

import pytest
import torch

from trl_ext import cli, doctor


def findings(check):
    return {finding.topic: finding for finding in check()}


def test_versions_out_of_range_and_missing_are_faults(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        if name == "optuna":
            raise importlib.metadata.PackageNotFoundError(name)
        return "5.4.0" if name == "transformers" else real(name)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", lambda _: [
        "transformers<6,>=5.5", "peft<1,>=0.18", "torch>=2.11", 'optuna>=4.5; extra == "search"',
        'pytest<2; extra == "dev"',
    ])  # fmt: skip
    found = findings(doctor.check_versions)
    assert (
        found["transformers"].level == "fault" and 'pip install "transformers<6,>=5.5"' in found["transformers"].text
    )
    assert found["peft"].level == "fault" and "missing" in found["peft"].text
    assert found["torch"].level == "ok"
    assert found["[search]"].level == "note" and 'pip install "trl-ext[search]"' in found["[search]"].text
    assert "pytest" not in found


def test_a_moved_seam_is_named(monkeypatch):
    from trl_ext import _upstream

    monkeypatch.setattr(_upstream, "__all__", ["add_optimizer_name", "gone"])
    found = findings(doctor.check_seams)
    assert found["seam"].level == "fault" and found["seam"].text.startswith("gone (module")
    assert found["SparsePOTrainer"].level == "ok"


def test_gpus_and_their_lack(monkeypatch):
    properties = namedtuple("Properties", "name major minor")("H100", 9, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert findings(doctor.check_devices)["GPU 0"] == ("note", "GPU 0", "H100, 20 of 80 GiB free, capability 9.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert findings(doctor.check_devices)["GPU"].level == "note"


def test_kernels_of_the_hub_are_named(monkeypatch, tmp_path):
    variable = "TRL_EXT_HUB_KERNELS"
    monkeypatch.delenv(variable, raising=False)
    assert findings(doctor._kernels_of_the_hub) == {}
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setenv(variable, f"trl-ext-adamp={tmp_path}")
    first, second = doctor._kernels_of_the_hub()
    assert first.level == "fault" and "pip install kernels" in first.text
    assert second.text == f"trl-ext-adamp of {tmp_path} on a GPU, if it fits"
    monkeypatch.setenv(variable, "adam")
    assert findings(doctor._kernels_of_the_hub)["kernels"].text.startswith("`TRL_EXT_HUB_KERNELS` names 'adam'")


def test_folders_without_room_or_rights(monkeypatch, tmp_path):
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1e9))
    assert doctor._disk("here", tmp_path / "not" / "there").level == "note"
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert doctor._disk("here", tmp_path).level == "fault"


def test_the_command(monkeypatch, capsys):
    def broken():
        yield doctor.Finding("ok", "one", "word " * 30)
        raise RuntimeError("no")

    monkeypatch.setattr(doctor, "CHECKS", {"Machine": doctor.check_machine, "Other": broken})
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: no" in out and out.endswith("1 fault.\n")
    assert max(map(len, out.splitlines())) <= 80
    assert cli.main(["doctor", "now"]) == 2
    assert "takes no arguments" in capsys.readouterr().err


def test_what_libraries_say_of_themselves_is_kept_back(monkeypatch, caplog, capsys):
    def check():
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward from")
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("the disk is full")
        yield doctor.Finding(doctor.OK, "import", "done")

    monkeypatch.setattr(doctor, "CHECKS", {"Libraries": check})
    assert doctor.main([]) == 0
    assert "import" in capsys.readouterr().out and caplog.messages == ["the disk is full"]


@pytest.mark.parametrize("title", ["Caches", "Compilers"])
def test_this_installation_is_without_fault(title):
    found = list(doctor.CHECKS[title]())
    assert found and {finding.level for finding in found} <= {"ok", "note"}
