"""An equilibrium-propagation head must not stand behind `lm_head`."""

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


_MESSAGE = (
    "An `EPHead` must not stand in `{name}`, where the output embeddings are: TRL's trainers read the weight of that "
    "module and never call it, so the head would be bypassed without a word. Put it before the output embeddings, or "
    "use it as `EPModelForSequenceClassification`, or as critic of `ConstrainedPPOTrainer` "
    "(`critic_head='equilibrium'`)."
)


def refuse_behind_lm_head(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """
    Refuses a model's output embeddings that are an [`EPHead`], or contain one.

    Args:
        module (`torch.nn.Module`):
            Module that gets a submodule.
        name (`str`):
            Name of the submodule in it.
        submodule (`torch.nn.Module`, *optional*):
            The submodule.

    Raises:
        ValueError: If `submodule` would be the output embeddings of a model of transformers.
    """
    if submodule is None or not hasattr(type(module), "get_output_embeddings"):
        return
    if name != "lm_head" and not _is_output_embeddings(module, name):
        return
    from .head import EPHead

    if any(isinstance(part, EPHead) for part in submodule.modules()):
        raise ValueError(_MESSAGE.format(name=name))


def _is_output_embeddings(module: Any, name: str) -> bool:
    current = getattr(module, name, None)
    return current is not None and current is module.get_output_embeddings()


def watch_registrations() -> None:
    """Calls [`refuse_behind_lm_head`] for every module that any module gets from now on."""
    register_module_module_registration_hook(refuse_behind_lm_head)
