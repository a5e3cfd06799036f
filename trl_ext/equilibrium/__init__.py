"""Equilibrium propagation: a head whose gradient comes from nudged relaxations."""

import importlib
from typing import TYPE_CHECKING, Any

from .lm_head_guard import watch_registrations


if TYPE_CHECKING:
    from .configuration import EPConfig as EPConfig
    from .head import EPHead as EPHead
    from .modeling import EPModelForSequenceClassification as EPModelForSequenceClassification

_EXPORTS = {"EPConfig": "configuration", "EPHead": "head", "EPModelForSequenceClassification": "modeling"}

watch_registrations()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {sorted(_EXPORTS)}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
