"""Kernels of the Hub in the place of the own ones: only where named, only where they fit, and never in the way."""

import importlib.util
import logging
import re
import sys

import pytest
import torch

from tests.helpers import hub_kernels as helper
from trl_ext.core import hub_kernel
from trl_ext.core.hub_kernel import KERNELS_VARIABLE, kernel_of_hub
from trl_ext.integrations import hub_kernels
from trl_ext.optim import install
from trl_ext.optim.kernels import plan
from trl_ext.sparse_po.lm_head import paired_log_probs, triton_kernels


HEAD = "trl-ext-paired-log-probs"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RUNNING = "    ref_label: torch.Tensor\n"


@pytest.fixture
def folder(tmp_path):
    return hub_kernels.build(tmp_path / "kernel", hub_kernels.PAIRED_LOG_PROBS)


@pytest.fixture
def kernels(monkeypatch):
    """A stand-in for the package, whatever is installed."""
    module = helper.stand_in()
    monkeypatch.setitem(sys.modules, "kernels", module)
    yield module
    helper.forget(*module.loaded)


def name_kernel(monkeypatch, place, name=HEAD):
    monkeypatch.setenv(KERNELS_VARIABLE, f"{name}={place}")


def test_without_the_variable_nothing_is_looked_for(monkeypatch):
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", None)
    assert kernel_of_hub(HEAD, triton_kernels) is triton_kernels
    paired_log_probs.take_kernel_of_hub(torch.device("cuda"))
    assert paired_log_probs._kernels is triton_kernels


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "trl-ext-paired-log-prob=a/b@" + COMMIT,
            "'trl-ext-paired-log-prob'.* Did you mean `trl-ext-paired-log-probs`",
        ),
        (f"{HEAD}=owner/kernel", "neither OWNER/REPOSITORY@COMMIT"),
        (f"{HEAD}=owner/kernel@main", "A branch or a tag can move"),
        (f"{HEAD}=owner/kernel@{COMMIT[:7]}", "all 40 digits"),
        (f"{HEAD}=no/such/folder", "nor a folder"),
        ("owner/kernel@" + COMMIT, "the kernels are trl-ext-adamp, trl-ext-paired-log-probs"),
    ],
)
def test_what_cannot_be_a_kernel_is_refused(value, message, monkeypatch):
    monkeypatch.setenv(KERNELS_VARIABLE, value)
    with pytest.raises(ValueError, match=message):
        kernel_of_hub(HEAD, triton_kernels)
    with pytest.raises(ValueError, match=message):
        paired_log_probs.take_kernel_of_hub(torch.device("cpu"))


def test_the_package_missing_is_said_once(folder, monkeypatch, caplog):
    name_kernel(monkeypatch, folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernel_of_hub(HEAD, triton_kernels) is triton_kernels
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.getMessage()
    assert "left aside, and trl_ext's own runs" in record.getMessage() and "pip install kernels" in record.getMessage()


def test_a_folder_takes_the_own_ones_place(folder, kernels, monkeypatch, caplog):
    pytest.importorskip("triton")
    caplog.set_level(logging.INFO, hub_kernel.__name__)
    name_kernel(monkeypatch, folder)
    monkeypatch.setattr(paired_log_probs, "_kernels", triton_kernels)
    paired_log_probs.take_kernel_of_hub(torch.device("cpu"))
    assert paired_log_probs._kernels is triton_kernels and not kernels.loaded
    paired_log_probs.take_kernel_of_hub(torch.device("cuda"))
    found = paired_log_probs._kernels
    assert found is not triton_kernels and str(folder) in found.__file__ and callable(found.fold)
    assert [record.getMessage() for record in caplog.records] == [f"{HEAD} of {folder} runs."]
    monkeypatch.delenv(KERNELS_VARIABLE)
    paired_log_probs.take_kernel_of_hub(torch.device("cuda"))
    assert paired_log_probs._kernels is triton_kernels


def test_adamp_takes_one_too(tmp_path, kernels, monkeypatch):
    pytest.importorskip("triton")
    name_kernel(monkeypatch, hub_kernels.build(tmp_path / "kernel"), "trl-ext-adamp")
    monkeypatch.setattr(plan, "substitute", None)
    install.take_kernel_of_hub()
    assert plan.substitute is None  # without a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    install.take_kernel_of_hub()
    own = plan._kernels()
    assert own is plan.substitute and str(tmp_path) in own.__file__ and own.measure_kernel.arg_names


@pytest.mark.parametrize(
    ("old", "new", "different"),
    [
        ("\nVERSION = 1\n", "\nVERSION = 2\n", "VERSION"),
        (RUNNING, RUNNING + "    third_label: torch.Tensor\n", "Running"),
        (
            "    policy_max: torch.Tensor\n    ref_max: torch.Tensor\n",
            "    ref_max: int\n    policy_max: int\n",
            "Running",
        ),
        ("    softcap: float | None\n", "", "Side"),
        ("labels: torch.Tensor, first_column: int) ->", "labels: torch.Tensor) ->", "fold"),
        ("def logit_gradient_(", "def logit_gradient(", "logit_gradient_"),
    ],
)
def test_one_that_does_not_fit_is_left_aside(old, new, different, folder, kernels, monkeypatch, caplog):
    path = folder / "build" / "torch-cpu" / "sparse_po" / "lm_head" / "triton_kernels.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    init = path.parents[2] / "__init__.py"
    init.write_text(init.read_text().replace("logit_gradient_", "AVAILABLE"))
    name_kernel(monkeypatch, folder)
    assert kernel_of_hub(HEAD, triton_kernels) is triton_kernels
    (record,) = caplog.records
    assert record.getMessage().endswith(f"it does not fit this version, in {different}.")


def test_other_columns_of_adamps_table_are_seen(tmp_path, kernels, monkeypatch, caplog):
    pytest.importorskip("triton")
    from trl_ext.optim.kernels import triton

    folder = hub_kernels.build(tmp_path / "kernel")
    path = folder / "build" / "torch-cpu" / "optim" / "kernels" / "table.py"
    text = path.read_text()
    assert "SIZE, OFFSET, DTYPE = range(28, 31)" in text
    path.write_text(text.replace("SIZE, OFFSET, DTYPE = range(28, 31)", "OFFSET, SIZE, DTYPE = range(28, 31)"))
    name_kernel(monkeypatch, folder, "trl-ext-adamp")
    assert kernel_of_hub("trl-ext-adamp", triton) is triton
    assert caplog.records[0].getMessage().endswith("in Column.")


def test_code_that_fails_is_left_aside(folder, kernels, monkeypatch, caplog):
    (folder / "build" / "torch-cpu" / "__init__.py").write_text("raise RuntimeError('of another torch\\nlong text')\n")
    name_kernel(monkeypatch, folder)
    assert kernel_of_hub(HEAD, triton_kernels) is triton_kernels
    assert caplog.records[0].getMessage().endswith("RuntimeError: of another torch")


def test_a_repository_is_asked_for_by_its_commit(folder, kernels, monkeypatch, caplog):
    asked = []

    def get_kernel(repository, **options):
        asked.append((repository, options))
        if len(asked) > 1:
            raise OSError("no network")
        return kernels.get_local_kernel(folder)

    kernels.get_kernel = get_kernel
    name_kernel(monkeypatch, f"owner/kernel@{COMMIT}")
    assert re.search(r"_trl_ext_paired_log_probs_cpu_\w+\.sparse_po", kernel_of_hub(HEAD, triton_kernels).__name__)
    assert kernel_of_hub(HEAD, triton_kernels) is triton_kernels
    assert asked == [("owner/kernel", {"revision": COMMIT, "trust_remote_code": ["owner/kernel"]})] * 2
    assert caplog.records[-1].getMessage().endswith("OSError: no network")
