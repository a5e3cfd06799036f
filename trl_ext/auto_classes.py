"""Our models among transformers' auto classes, as soon as transformers is imported, and without importing it."""

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def register_config() -> None:
    """Makes [`~transformers.AutoConfig`] know `EPConfig`."""
    from transformers import AutoConfig

    from .equilibrium.configuration import EPConfig

    AutoConfig.register(EPConfig.model_type, EPConfig, exist_ok=True)


def register_model() -> None:
    """Makes [`~transformers.AutoModelForSequenceClassification`] know `EPModelForSequenceClassification`."""
    modeling_auto: Any = importlib.import_module(_MODELS)

    from .equilibrium.configuration import EPConfig
    from .equilibrium.modeling import EPModelForSequenceClassification

    modeling_auto.AutoModelForSequenceClassification.register(
        EPConfig, EPModelForSequenceClassification, exist_ok=True
    )


_MODELS = "transformers.models.auto.modeling_auto"
# Module of transformers: what to do once it is imported
REGISTRATIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_config,
    _MODELS: register_model,
}


def register_on_import() -> None:
    """
    Registers our classes where transformers' auto classes are imported already, and otherwise when they will be, so
    that `import trl_ext` imports neither transformers nor torch.
    """
    pending = dict(REGISTRATIONS)
    for name in REGISTRATIONS:
        if name in sys.modules:
            pending.pop(name)()
    if pending and not any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisteringFinder(pending))


class _RegisteringFinder:
    """Finds the modules of `pending` as Python would, and calls their function after they ran, once."""

    def __init__(self, pending: dict[str, Callable[[], None]]):
        self.pending = pending

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.pending:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        register, run = self.pending.pop(name), spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
