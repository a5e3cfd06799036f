"""
AdamP and SGDP (https://huggingface.co/papers/2006.08217), the radial family AdamO and AdamH, sharded matrices for
optimizers of your own, and optimizers by name.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .adamh import AdamH
from .adamo import AdamO
from .adamp import AdamP
from .matrices import ShardedMatrices
from .radial import hidden_matrices
from .scale_invariance import scale_invariant_weights
from .sgdp import SGDP


# Imported on first use, since they import transformers
_EXPORTS = {
    "OptimizerCheckCallback": "callbacks",
    "OptimizerMixin": "install",
    "OptimizerReportCallback": "callbacks",
    "optimizer_factory": "names",
    "register": "install",
    "register_optimizer": "names",
    "unregister": "install",
}

__all__ = [
    "SGDP", "AdamH", "AdamO", "AdamP", "ShardedMatrices", "hidden_matrices", "scale_invariant_weights", *_EXPORTS,
]  # fmt: skip

if TYPE_CHECKING:
    from .callbacks import OptimizerCheckCallback as OptimizerCheckCallback
    from .callbacks import OptimizerReportCallback as OptimizerReportCallback
    from .install import OptimizerMixin as OptimizerMixin
    from .install import register as register
    from .install import unregister as unregister
    from .names import optimizer_factory as optimizer_factory
    from .names import register_optimizer as register_optimizer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'trl_ext.optim' has no attribute {name!r}; it has {sorted(__all__)}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
