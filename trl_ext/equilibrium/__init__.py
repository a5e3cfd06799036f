"""Equilibrium propagation: a head whose gradient comes from nudged relaxations.

Nothing is imported before it is asked for: `EPHead` needs torch alone.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .configuration import EPConfig as EPConfig
    from .head import EPHead as EPHead
    from .head import install_lm_head_guard as install_lm_head_guard
    from .head import remove_lm_head_guard as remove_lm_head_guard
    from .modeling import EPModelForSequenceClassification as EPModelForSequenceClassification
    from .modeling import register_auto_classes as register_auto_classes
    from .modeling import unregister_auto_classes as unregister_auto_classes
    from .report import EPAlignmentCallback as EPAlignmentCallback
    from .settings import HeadSettings as HeadSettings
    from .training import EPRewardConfig as EPRewardConfig
    from .training import EPRewardTrainer as EPRewardTrainer
    from .training import EPTrainer as EPTrainer
    from .training import EPTrainingArguments as EPTrainingArguments
    from .value_heads import EPValueHeads as EPValueHeads

_EXPORTS = {
    "EPAlignmentCallback": "report",
    "EPConfig": "modeling",
    "EPHead": "head",
    "EPModelForSequenceClassification": "modeling",
    "EPRewardConfig": "training",
    "EPRewardTrainer": "training",
    "EPTrainer": "training",
    "EPTrainingArguments": "training",
    "EPValueHeads": "value_heads",
    "HeadSettings": "settings",
    "install_lm_head_guard": "head",
    "register_auto_classes": "modeling",
    "remove_lm_head_guard": "head",
    "unregister_auto_classes": "modeling",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {sorted(_EXPORTS)}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
