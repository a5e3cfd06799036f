"""Dropout off in a whole model, wherever it keeps the probabilities: a policy that drops units when it is trained and
none when it samples is compared with another policy than the one that acted."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig


class DroppedProbability(NamedTuple):
    """A probability in a model's configuration, as it was."""

    config: PretrainedConfig
    name: str
    value: float


def disable_dropout(model: nn.Module) -> list[DroppedProbability]:
    """
    Sets every dropout probability of a model to 0: of dropout modules, adapters' included, of attributes that a
    functional dropout reads (OPT, Bloom, Falcon, GPTBigCode, BioGPT, XGLM, Seed-OSS; layers skipped at random), and of
    the configurations that modules read in their forward. Routers that add noise or draw their experts (`*jitter*`
    above zero: PhiMoE, and Mixtral, MiniMax and DBRX where so configured) stay in evaluation mode, since such a number
    may be part of what they compute there. TRL's `disable_dropout` sees `nn.Dropout` only.

    Args:
        model (`torch.nn.Module`):
            Model, changed in place.

    Returns:
        `list[DroppedProbability]`: what its configurations said, for [`stated_probabilities`].
    """
    configs: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name in _probabilities(vars(module)):
            setattr(module, name, 0.0)
        if any("jitter" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items()):
            module.eval()
            module.train = partial(_stay, module)  # type: ignore[method-assign]
        _collect(getattr(module, "config", None), configs)
    found = [
        DroppedProbability(config, name, getattr(config, name))
        for config in configs.values()
        for name in _probabilities(vars(config))
    ]
    for config, name, _ in found:
        setattr(config, name, 0.0)
    return found


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """In place of a module's `train`: it stays in the mode that it is in."""
    return module


def _collect(config: Any, found: dict[int, PretrainedConfig]) -> None:
    """A configuration and those inside it, each once."""
    if isinstance(config, PretrainedConfig) and id(config) not in found:
        found[id(config)] = config
        for value in vars(config).values():
            _collect(value, found)


def _probabilities(attributes: dict[str, Any]) -> list[str]:
    return [
        name for name, value in attributes.items() if "drop" in name.lower() and isinstance(value, float) and value > 0
    ]


@contextmanager
def stated_probabilities(found: list[DroppedProbability]) -> Iterator[None]:
    """Lets the configurations say what they said before [`disable_dropout`] while the context lasts: a saved model is
    to be the one that was handed over."""
    for config, name, value in found:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in found:
            setattr(config, name, 0.0)
