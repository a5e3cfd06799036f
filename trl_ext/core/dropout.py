"""Dropout off in a whole model, wherever it keeps the probabilities: a policy that drops units when it is trained and
none when it samples is compared with another policy than the one that acted."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig


_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class DroppedProbability(NamedTuple):
    """A probability in a model's configuration, as it was."""

    config: PretrainedConfig
    name: str
    value: float


def disable_dropout(model: nn.Module) -> list[DroppedProbability]:
    """
    Sets every dropout probability of a model to 0: of dropout modules, adapters' included, of attributes that a
    functional dropout reads (`attention_dropout`, `layerdrop`, `drop_path`), and of the configurations that modules
    read in their forward.

    Args:
        model (`torch.nn.Module`):
            Model, changed in place.

    Returns:
        `list[DroppedProbability]`: what its configurations said, for [`stated_probabilities`].
    """
    configs: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, _MODULES):
            module.p = 0.0
        for name in _probabilities(vars(module)):
            setattr(module, name, 0.0)
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig):
            configs[id(config)] = config
    found = [
        DroppedProbability(config, name, getattr(config, name))
        for config in configs.values()
        for name in _probabilities(vars(config))
    ]
    for config, name, _ in found:
        setattr(config, name, 0.0)
    return found


def _probabilities(attributes: dict[str, Any]) -> list[str]:
    return [name for name, value in attributes.items() if "drop" in name and isinstance(value, float) and value > 0]


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
