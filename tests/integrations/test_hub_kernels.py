"""The layout for the Hub, loaded as `kernels` loads it: by path, under a name of its own, without this package."""

import importlib.util
import json
import sys
import tomllib

import pytest
import torch

import trl_ext.optim
from tests.helpers import hub_kernels as helper
from trl_ext.core.hub_kernel import kernel_of_hub
from trl_ext.integrations import hub_kernels
from trl_ext.optim.kernels import compilation
from trl_ext.sparse_po.lm_head import triton_kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hub_kernels.build(tmp_path_factory.mktemp("hub") / "kernel")


@pytest.fixture(scope="module")
def kernel(folder):
    module = helper.load(folder)
    yield module
    helper.forget(module)


def test_layout(folder):
    general = tomllib.loads((folder / "build.toml").read_text())
    assert general["general"]["name"] == "trl-ext-adamp" and general["general"]["backends"] == ["cpu", "cuda"]
    assert "torch-noarch" in general and (folder / "README.md").read_text().startswith("---\nlibrary_name: kernels\n")
    trees = [folder / "torch-ext" / "trl_ext_adamp", *(folder / "build" / f"torch-{one}" for one in ("cpu", "cuda"))]
    files = [
        {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}
        for tree in trees
    ]
    metadata = [json.loads(own.pop("metadata.json")) for own in files[1:]]
    assert files[0] == files[1] == files[2]
    assert [own["backend"]["type"] for own in metadata] == ["cpu", "cuda"] and len(
        {own["id"] for own in metadata}
    ) == 2
    assert {"__init__.py", "optim/adamp.py", "optim/kernels/triton.py"} < files[0].keys()
    assert {str(path.relative_to(hub_kernels.ROOT)) for path in compilation.SOURCES} < files[0].keys()
    # The sources are this package's, byte for byte
    for path, content in files[0].items():
        if not path.endswith("__init__.py"):
            assert content == (hub_kernels.ROOT / path).read_bytes()


@pytest.mark.parametrize(("name", "options"), [("AdamP", {}), ("SGDP", {"momentum": 0.9})])
def test_it_steps_as_this_packages_own(kernel, name, options):
    torch.manual_seed(0)
    start, gradients = torch.randn(8, 16), torch.randn(3, 8, 16)
    ends = []
    for module in (kernel, trl_ext.optim):
        optimizer_cls = getattr(module, name)
        weight = torch.nn.Parameter(start.clone())
        optimizer = optimizer_cls([weight], lr=0.1, weight_decay=0.1, delta=0.5, **options)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        assert optimizer_cls.__module__.startswith(module.__name__)
        ends.append(weight.detach())
    assert torch.equal(*ends) and not torch.equal(ends[0], start)
    own = sys.modules[f"{kernel.__name__}.optim.kernels.compilation"]
    assert (own.compiled_library() is None) == (compilation.compiled_library() is None)


def test_it_does_not_import_this_package(kernel):
    own = [name for name in sys.modules if name.partition(".")[0] == kernel.__name__]
    assert len(own) > 10
    for name in own:
        for value in vars(sys.modules[name]).values():
            assert not str(getattr(value, "__module__", "")).startswith("trl_ext.")


def test_the_tiles_of_the_head(tmp_path):
    """Kernels alone; `tests.sparse_po.head_cases` runs them, and the example of their card."""
    folder = tmp_path / "kernel"
    assert hub_kernels.main(["--output_dir", str(folder), "--kernel", "trl-ext-paired-log-probs"]) == 0
    source = folder / "torch-ext" / "trl_ext_paired_log_probs"
    modules = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    packages = {"__init__.py", "sparse_po/__init__.py", "sparse_po/lm_head/__init__.py"}
    assert modules == {*packages, "sparse_po/lm_head/triton_kernels.py"}
    with pytest.raises(FileExistsError, match="holds something else"):
        hub_kernels.build(folder)  # of another kernel


def test_only_relative_imports_and_only_into_its_own_folder(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text("from trl_ext import optim\n")
    monkeypatch.setattr(hub_kernels, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"one\.py imports `trl_ext` by its name"):
        hub_kernels.modules_of(("one.py",))
    (tmp_path / "two.py").write_text("def f():\n    from .sub.three import x\n    from . import four\n")
    (tmp_path / "four.py").write_text("")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "three.py").write_text("import torch\nfrom ..four import y\n")
    assert hub_kernels.modules_of(("two.py",)) == ["four.py", "sub/three.py", "two.py"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path, folder):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        hub_kernels.build(tmp_path)
    before = (folder / "build" / "torch-cpu" / "metadata.json").read_text()
    (folder / "left.txt").write_text("of an older layout")
    assert hub_kernels.main(["--output_dir", str(folder)]) == 0
    assert not (folder / "left.txt").exists()
    assert (folder / "build" / "torch-cpu" / "metadata.json").read_text() == before


@pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="`kernels` is not installed")
def test_kernels_loads_both(folder, tmp_path, monkeypatch):
    from kernels import get_local_kernel

    assert get_local_kernel(folder, backend="cpu").AdamP.__name__ == "AdamP"
    pytest.importorskip("triton")
    head = hub_kernels.build(tmp_path / "head", hub_kernels.PAIRED_LOG_PROBS)
    monkeypatch.setenv("TRL_EXT_HUB_KERNELS", f"trl-ext-paired-log-probs={head}")
    found = kernel_of_hub("trl-ext-paired-log-probs", triton_kernels)
    assert found is not triton_kernels and found.Running._fields == triton_kernels.Running._fields
