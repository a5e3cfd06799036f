"""The package `kernels` as far as these tests need it: a layout is loaded by path, under the id of its metadata."""

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


def load(folder, backend="cpu"):
    """`build/torch-cpu` of a layout, imported as `kernels` does it."""
    variant = Path(folder) / "build" / f"torch-{backend}"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forget(*modules):
    """Removes kernels, with what they brought, from the imported modules."""
    names = {module.__name__ for module in modules}
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] in names]:
        del sys.modules[loaded]


def stand_in(get_kernel=None):
    """A module `kernels` that loads folders, and repositories as it is told."""
    module = ModuleType("kernels")
    module.__spec__ = ModuleSpec("kernels", None)
    module.loaded = []

    def get_local_kernel(folder):
        module.loaded.append(load(folder))
        return module.loaded[-1]

    module.get_local_kernel, module.get_kernel = get_local_kernel, get_kernel
    return module
