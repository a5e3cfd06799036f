"""AdamP and SGDP (https://huggingface.co/papers/2006.08217), and optimizers by name."""

import importlib
from typing import TYPE_CHECKING, Any

from .adamp import AdamP
from .known_views import scale_invariant_weights
from .sgdp import SGDP


# Imported on first use, since they import transformers
_EXPORTS = {
    "OptimizerCheckCallback": "optimizer_check_callback",
    "OptimizerMixin": "optimizer_mixin",
    "OptimizerReportCallback": "optimizer_report_callback",
    "optimizer_factory": "factory",
    "register": "factory",
    "register_optimizer": "factory",
    "unregister": "factory",
}

__all__ = ["SGDP", "AdamP", "scale_invariant_weights", *_EXPORTS]

if TYPE_CHECKING:
    from .factory import optimizer_factory as optimizer_factory
    from .factory import register as register
    from .factory import register_optimizer as register_optimizer
    from .factory import unregister as unregister
    from .optimizer_check_callback import OptimizerCheckCallback as OptimizerCheckCallback
    from .optimizer_mixin import OptimizerMixin as OptimizerMixin
    from .optimizer_report_callback import OptimizerReportCallback as OptimizerReportCallback


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'trl_ext.optim' has no attribute {name!r}; it has {sorted(__all__)}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
