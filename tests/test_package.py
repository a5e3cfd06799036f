import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trl_ext
from tests.helpers.imports import circles, import_graph


ROOT = Path(trl_ext.__file__).parent


def test_every_export_exists():
    for name in trl_ext.__all__:
        assert getattr(trl_ext, name) is not None
    assert set(trl_ext.__all__) <= set(dir(trl_ext))


def test_unknown_name():
    with pytest.raises(AttributeError, match="SparsePOTrainer"):
        trl_ext.SparsePOTrainr  # noqa: B018


def test_import_is_light():
    code = "import sys, trl_ext; print(sorted({'trl', 'transformers', 'torch', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_private_names_stand_in_one_module():
    pattern = re.compile(
        r"^\s*from (trl|transformers|accelerate|deepspeed|peft)\.(trainer\.utils|models\.utils|\S*\._)", re.M
    )
    found = [path.name for path in ROOT.rglob("*.py") if pattern.search(path.read_text())]
    assert found == ["_upstream.py"]


def test_no_module_imports_itself_in_a_circle():
    """Imports for types alone and inside functions count too: they are how circles are hidden."""
    assert circles(import_graph(ROOT)) == []


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def method_of(module):
    """The method's folder that a module stands in, or `None`."""
    folder = f"{module}.".split(".")[1]
    return folder if folder in ("sparse_po", "constrained_ppo", "optim", "equilibrium") else None


def test_methods_do_not_import_each_other():
    """Only what docs/architecture.md names: the critic may be an equilibrium head; configs know our optimizers."""
    allowed = (
        "trl_ext.optim.names",
        "trl_ext.optim.install",
        "trl_ext.equilibrium",
        "trl_ext.equilibrium.value_heads",
    )
    crossing = {
        (module, other)
        for module, others in import_graph(ROOT).items()
        for other in others
        if method_of(module) and method_of(other) and method_of(module) != method_of(other)
    }
    assert {(module, other) for module, other in crossing if other not in allowed} == set()


EFFECTS = """
import json, os, sys, warnings
sys.modules["peft"] = None  # an extra, which is not installed here
import torch, transformers, trl
from torch.nn.modules import module as nn_module
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.training_args import OptimizerNames

def state():
    return {
        "meta_path": [type(finder).__name__ for finder in sys.meta_path],
        "hooks": {name: repr(value) for name, value in vars(nn_module).items() if name.startswith("_global")},
        "optimizers": sorted(OptimizerNames.__members__),
        "callbacks": [callback.__name__ for callback in DEFAULT_CALLBACKS],
        "environment": dict(os.environ),
        "filters": len(warnings.filters),
        "dtype": str(torch.get_default_dtype()),
        "forwards": [trl.DPOTrainer._compute_loss.__qualname__, trl.GRPOTrainer._compute_loss.__qualname__],
    }

# What building the parents' configs changes by itself is not ours
trl.DPOConfig("x", report_to="none", use_cpu=True, bf16=False)
trl.GRPOConfig("x", report_to="none", use_cpu=True, bf16=False)
before = state()
import trl_ext
for name in trl_ext.__all__:
    getattr(trl_ext, name)
common = dict(report_to="none", use_cpu=True, bf16=False)
trl_ext.SparsePOConfig("x", optim="adamp", **common)
trl_ext.ConstrainedPPOConfig("x", method="ppo", optim="sgdp", **common)
trl_ext.EPRewardConfig(output_dir="x", **common)
trl_ext.EPTrainingArguments(output_dir="x", **common)
after = state()
print(json.dumps({key: [before[key], after[key]] for key in before if before[key] != after[key]}))
"""


def test_importing_and_building_configs_changes_nothing_in_the_process():
    done = subprocess.run([sys.executable, "-c", EFFECTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def test_files_and_functions_keep_their_size():
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text()
        if text.count("\n") > 700:
            found.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and node.end_lineno - body[0].lineno >= 60:
                    found.append(f"{path.name} {node.name}: {node.end_lineno - body[0].lineno + 1} lines")
    assert found == []


def test_version_stands_in_one_place():
    pattern = re.compile(rf"version__? *= *[\"']{re.escape(trl_ext.__version__)}")
    files = [*ROOT.rglob("*.py"), ROOT.parent / "pyproject.toml"]
    assert [path.name for path in files if pattern.search(path.read_text())] == ["_version.py"]


def test_tests_share_through_helpers_only():
    """No test module imports another: what two need stands in `tests/helpers/`."""
    tests = Path(__file__).parent
    pattern = re.compile(r"^\s*(from|import) tests\.(?!helpers|benchmarks|gpu\.)\S*test_", re.MULTILINE)
    assert [path.name for path in tests.rglob("*.py") if pattern.search(path.read_text())] == []
