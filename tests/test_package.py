import subprocess
import sys

import pytest

import trl_ext


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
    import re
    from pathlib import Path

    root = Path(trl_ext.__file__).parent
    pattern = re.compile(
        r"^\s*from (trl|transformers|accelerate|deepspeed|peft)\.(trainer\.utils|models\.utils|\S*\._)", re.M
    )
    found = [path.name for path in root.rglob("*.py") if pattern.search(path.read_text())]
    assert found == ["_upstream.py"]
