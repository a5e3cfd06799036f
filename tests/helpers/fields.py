"""Every configuration class of ours, what it is built with, and the fields that it adds."""

import dataclasses

from transformers import LlamaConfig

from trl_ext import (
    ConstrainedGRPOConfig,
    ConstrainedPPOConfig,
    EPConfig,
    EPRewardConfig,
    EPTrainingArguments,
    SparsePOConfig,
)
from trl_ext.constrained_ppo.constraints import Constraint
from trl_ext.constrained_ppo.threshold_search.config import ThresholdSearchConfig
from trl_ext.equilibrium.settings import HeadSettings
from trl_ext.scripts.constrained_ppo import ConstrainedPPOScriptArguments
from trl_ext.scripts.equilibrium_classifier import EPClassifierScriptArguments
from trl_ext.scripts.recipe.equilibrium_arguments import EPHeadArguments
from trl_ext.scripts.sparse_po import SparsePOScriptArguments
from trl_ext.scripts.trl_scripts import OptimizerScriptArguments


TRAINING = {"use_cpu": True, "bf16": False, "report_to": "none"}
PPO = {"method": "xi", "constraints": [{"reward": "a", "threshold": 0.5}], **TRAINING}
# Class: what it is built with
OWN = {
    SparsePOConfig: TRAINING,
    ConstrainedPPOConfig: PPO,
    ConstrainedGRPOConfig: {**TRAINING, "per_device_train_batch_size": 8},
    EPTrainingArguments: {"use_cpu": True, "report_to": "none"},
    EPRewardConfig: TRAINING,
    EPConfig: {"text_config": LlamaConfig(), "feedback": "asymmetric"},
    HeadSettings: {"feedback": "asymmetric"},
    ThresholdSearchConfig: {},
    Constraint: {"reward": "a", "threshold": 0.5},
    EPHeadArguments: {"head_feedback": "asymmetric"},
    SparsePOScriptArguments: {},
    ConstrainedPPOScriptArguments: {},
    EPClassifierScriptArguments: {},
    OptimizerScriptArguments: {},
}


def own_fields(cls):
    """Fields that the class, and not one of TRL's or transformers', declares."""
    ours = [base for base in cls.__mro__ if base.__module__.split(".")[0] in ("trl_ext", "types")]
    names = {name for base in ours for name in vars(base).get("__annotations__", {})}
    return [f.name for f in dataclasses.fields(cls) if f.name in names and f.init]
