"""Published methods as plugins for Hugging Face TRL."""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .core.auto_classes import register_on_import


_EXPORTS = {
    "ActivationTokenMask": "trl_ext.sparse_po.masks",
    "ConstrainedPPOConfig": "trl_ext.constrained_ppo.constrained_ppo_config",
    "ConstrainedPPOTrainer": "trl_ext.constrained_ppo.constrained_ppo_trainer",
    "ConstraintDashboardCallback": "trl_ext.constrained_ppo.dashboard",
    "EPAlignmentCallback": "trl_ext.equilibrium.alignment_callback",
    "EPConfig": "trl_ext.equilibrium.configuration",
    "EPHead": "trl_ext.equilibrium.head",
    "EPModelForSequenceClassification": "trl_ext.equilibrium.modeling",
    "EPRewardConfig": "trl_ext.equilibrium.ep_reward_config",
    "EPRewardTrainer": "trl_ext.equilibrium.ep_reward_trainer",
    "EPTrainer": "trl_ext.equilibrium.ep_trainer",
    "EPTrainingArguments": "trl_ext.equilibrium.ep_trainer",
    "LearnedTokenMask": "trl_ext.sparse_po.masks",
    "SparsePOConfig": "trl_ext.sparse_po.sparse_po_config",
    "SparsePOTrainer": "trl_ext.sparse_po.sparse_po_trainer",
    "TokenMaskCallback": "trl_ext.sparse_po.token_mask_callback",
    "paired_log_probs": "trl_ext.sparse_po.paired_lm_head",
    "sparse_po_loss": "trl_ext.sparse_po.loss",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .constrained_ppo.constrained_ppo_config import ConstrainedPPOConfig as ConstrainedPPOConfig
    from .constrained_ppo.constrained_ppo_trainer import ConstrainedPPOTrainer as ConstrainedPPOTrainer
    from .constrained_ppo.dashboard import ConstraintDashboardCallback as ConstraintDashboardCallback
    from .equilibrium.alignment_callback import EPAlignmentCallback as EPAlignmentCallback
    from .equilibrium.configuration import EPConfig as EPConfig
    from .equilibrium.ep_reward_config import EPRewardConfig as EPRewardConfig
    from .equilibrium.ep_reward_trainer import EPRewardTrainer as EPRewardTrainer
    from .equilibrium.ep_trainer import EPTrainer as EPTrainer
    from .equilibrium.ep_trainer import EPTrainingArguments as EPTrainingArguments
    from .equilibrium.head import EPHead as EPHead
    from .equilibrium.modeling import EPModelForSequenceClassification as EPModelForSequenceClassification
    from .sparse_po.loss import sparse_po_loss as sparse_po_loss
    from .sparse_po.masks import ActivationTokenMask as ActivationTokenMask
    from .sparse_po.masks import LearnedTokenMask as LearnedTokenMask
    from .sparse_po.paired_lm_head import paired_log_probs as paired_log_probs
    from .sparse_po.sparse_po_config import SparsePOConfig as SparsePOConfig
    from .sparse_po.sparse_po_trainer import SparsePOTrainer as SparsePOTrainer
    from .sparse_po.token_mask_callback import TokenMaskCallback as TokenMaskCallback


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'trl_ext' has no attribute {name!r}; it has {sorted(__all__)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


# transformers' auto classes load our models after `import trl_ext`
register_on_import()
