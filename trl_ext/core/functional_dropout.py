"""Dropout that is no module: probabilities which blocks keep as numbers or read from their config."""

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig


def disable_functional_dropout(model: nn.Module) -> None:
    """
    Sets to 0 every probability of dropout that a model, its blocks or its configs hold: of dropout as a function (OPT,
    Bloom, Falcon, GPTBigCode, BioGPT, XGLM, Seed-OSS), of skipped layers, and of dropout modules that are no
    `nn.Dropout`. TRL's `disable_dropout` sees the modules only.

    Args:
        model (`torch.nn.Module`):
            Model, changed in place. Its saved config then has probabilities of 0.
    """
    configs: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _set_to_zero(module)
        _collect(getattr(module, "config", None), configs)
    for config in configs.values():
        _set_to_zero(config)


def _set_to_zero(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        if "drop" in name.lower() and isinstance(value, float) and value > 0:
            setattr(holder, name, 0.0)


def _collect(config: Any, found: dict[int, PreTrainedConfig]) -> None:
    """A config and those inside it, each once."""
    if isinstance(config, PreTrainedConfig) and id(config) not in found:
        found[id(config)] = config
        for value in vars(config).values():
            _collect(value, found)
