"""Our models among transformers' auto classes, as soon as transformers is imported, and without importing it."""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


# Module with transformers' auto classes: module of ours that registers a class with them when it is imported
REGISTERED = {
    "transformers.models.auto.configuration_auto": "trl_ext.equilibrium.configuration",
    "transformers.models.auto.modeling_auto": "trl_ext.equilibrium.modeling",
}


def register_on_import() -> None:
    """
    Registers our classes where transformers' auto classes are imported already, and otherwise when they will be, so
    that `import trl_ext` imports neither transformers nor torch.
    """
    pending = {name: ours for name, ours in REGISTERED.items() if name not in sys.modules}
    if pending and not any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisteringFinder(pending))
    for name in REGISTERED.keys() - pending.keys():
        importlib.import_module(REGISTERED[name])


class _RegisteringFinder:
    """Finds the modules of `pending` as Python would, and after they ran imports ours, once."""

    def __init__(self, pending: dict[str, str]):
        self.pending = pending

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.pending:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        ours, run = self.pending.pop(name), spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            # Half imported where it is what imports transformers; it registers its class at its end
            importlib.import_module(ours)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
