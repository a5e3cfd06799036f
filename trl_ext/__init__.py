"""Published methods as plugins for Hugging Face TRL."""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__


_EXPORTS = {
    "ActivationTokenMask": "trl_ext.sparse_po.masks",
    "ConstrainedGRPOConfig": "trl_ext.constrained_ppo.constrained_grpo",
    "ConstrainedGRPOTrainer": "trl_ext.constrained_ppo.constrained_grpo",
    "ConstrainedPPOConfig": "trl_ext.constrained_ppo.constrained_ppo_config",
    "ConstrainedPPOTrainer": "trl_ext.constrained_ppo.constrained_ppo_trainer",
    "ConstraintDashboardCallback": "trl_ext.constrained_ppo.report",
    "EPAlignmentCallback": "trl_ext.equilibrium.report",
    "EPConfig": "trl_ext.equilibrium.modeling",
    "EPHead": "trl_ext.equilibrium.head",
    "EPModelForSequenceClassification": "trl_ext.equilibrium.modeling",
    "EPRewardConfig": "trl_ext.equilibrium.training",
    "EPRewardTrainer": "trl_ext.equilibrium.training",
    "EPTrainer": "trl_ext.equilibrium.training",
    "EPTrainingArguments": "trl_ext.equilibrium.training",
    "EPValueHeads": "trl_ext.equilibrium.value_heads",
    "LearnedTokenMask": "trl_ext.sparse_po.masks",
    "SparsePOConfig": "trl_ext.sparse_po.sparse_po_config",
    "SparsePOTrainer": "trl_ext.sparse_po.sparse_po_trainer",
    "TokenMaskCallback": "trl_ext.sparse_po.report",
    "critic_from_pretrained": "trl_ext.constrained_ppo.checkpoint",
    "paired_log_probs": "trl_ext.sparse_po.lm_head.paired_log_probs",
    "sparse_po_loss": "trl_ext.sparse_po.loss",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .constrained_ppo.checkpoint import critic_from_pretrained as critic_from_pretrained
    from .constrained_ppo.constrained_grpo import ConstrainedGRPOConfig as ConstrainedGRPOConfig
    from .constrained_ppo.constrained_grpo import ConstrainedGRPOTrainer as ConstrainedGRPOTrainer
    from .constrained_ppo.constrained_ppo_config import ConstrainedPPOConfig as ConstrainedPPOConfig
    from .constrained_ppo.constrained_ppo_trainer import ConstrainedPPOTrainer as ConstrainedPPOTrainer
    from .constrained_ppo.report import ConstraintDashboardCallback as ConstraintDashboardCallback
    from .equilibrium.head import EPHead as EPHead
    from .equilibrium.modeling import EPConfig as EPConfig
    from .equilibrium.modeling import EPModelForSequenceClassification as EPModelForSequenceClassification
    from .equilibrium.report import EPAlignmentCallback as EPAlignmentCallback
    from .equilibrium.training import EPRewardConfig as EPRewardConfig
    from .equilibrium.training import EPRewardTrainer as EPRewardTrainer
    from .equilibrium.training import EPTrainer as EPTrainer
    from .equilibrium.training import EPTrainingArguments as EPTrainingArguments
    from .equilibrium.value_heads import EPValueHeads as EPValueHeads
    from .sparse_po.lm_head.paired_log_probs import paired_log_probs as paired_log_probs
    from .sparse_po.loss import sparse_po_loss as sparse_po_loss
    from .sparse_po.masks import ActivationTokenMask as ActivationTokenMask
    from .sparse_po.masks import LearnedTokenMask as LearnedTokenMask
    from .sparse_po.report import TokenMaskCallback as TokenMaskCallback
    from .sparse_po.sparse_po_config import SparsePOConfig as SparsePOConfig
    from .sparse_po.sparse_po_trainer import SparsePOTrainer as SparsePOTrainer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'trl_ext' has no attribute {name!r}; it has {sorted(__all__)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
