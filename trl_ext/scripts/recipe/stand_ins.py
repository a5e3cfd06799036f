"""Stand-ins of configuration classes, read from their source: names, types, defaults and help without torch.

A stand-in has the fields of its class and no checks. [`StrictParser`] takes it in the class's place, so that a wrong
key is refused, and `--help` printed, before anything heavy is imported. tests/scripts/test_stand_ins.py holds every
command's stand-ins equal to its classes.
"""

from dataclasses import field, fields, make_dataclass
from typing import Any

from .source_classes import stand_in


# Names that `trl_ext.optim.register` adds to transformers' optimizers
OWN_OPTIMIZERS = ("adamp", "sgdp", "adamo", "adamh")
_OF_TRL = (("trl", "ModelConfig"), ("trl", "DatasetMixtureConfig"))
_EQUILIBRIUM = ("trl_ext.scripts.recipe.equilibrium_arguments", "EPHeadArguments")


def _own(module: str, config: str, *more: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return (("trl", "ScriptArguments"), (module, config), *_OF_TRL, *more)


def _trl(script_arguments: tuple[str, str], config: str) -> tuple[tuple[str, str], ...]:
    more = (
        ("trl_ext.scripts.trl_scripts", "OptimizerScriptArguments"),
        ("trl_ext.core.run_arguments", "RunArguments"),
    )
    return (script_arguments, ("trl", config), *_OF_TRL, *more)


_PLAIN = ("trl", "ScriptArguments")
_PPO_SCRIPT = ("trl_ext.scripts.constrained_ppo", "ConstrainedPPOScriptArguments")
# Script module, below `trl_ext.scripts`: module and name of each class of its parser, in its order
CLASSES: dict[str, tuple[tuple[str, str], ...]] = {
    "sparse_po": _own(
        "trl_ext.sparse_po.sparse_po_config", "SparsePOConfig",
        ("trl_ext.scripts.sparse_po", "SparsePOScriptArguments"),
    ),
    "constrained_ppo": _own(
        "trl_ext.constrained_ppo.constrained_ppo_config", "ConstrainedPPOConfig", _PPO_SCRIPT
    ),
    "constrained_grpo": _own("trl_ext.constrained_ppo.constrained_grpo", "ConstrainedGRPOConfig", _PPO_SCRIPT),
    "equilibrium_reward": _own("trl_ext.equilibrium.training", "EPRewardConfig", _EQUILIBRIUM),
    "equilibrium_classifier": _own(
        "trl_ext.equilibrium.training", "EPTrainingArguments", _EQUILIBRIUM,
        ("trl_ext.scripts.equilibrium_classifier", "EPClassifierScriptArguments"),
    ),
    "sft": _trl(_PLAIN, "SFTConfig"),
    "dpo": _trl(_PLAIN, "DPOConfig"),
    "grpo": _trl(("trl.scripts.grpo", "GRPOScriptArguments"), "GRPOConfig"),
    "kto": _trl(_PLAIN, "KTOConfig"),
    "reward": _trl(_PLAIN, "RewardConfig"),
    "rloo": _trl(("trl.scripts.rloo", "RLOOScriptArguments"), "RLOOConfig"),
}  # fmt: skip


def light_parser(module: str, prog: str | None = None) -> Any:
    """
    The strict parser of a script, made from stand-ins.

    Args:
        module (`str`):
            The script's module, such as `"trl_ext.scripts.sparse_po"`.
        prog (`str`, *optional*):
            Name of the program.

    Returns:
        [`StrictParser`] or `None`: `None` where the installed versions' source cannot be read in this way, and the
        script's own `make_parser` has to do.
    """
    from .strict_parser import StrictParser

    try:
        classes = tuple(stand_in(home, name) for home, name in CLASSES[module.rpartition(".")[2]])
        parser = StrictParser(classes, prog=prog)
    except Exception:  # whatever other versions' source holds that is not foreseen here
        return None
    optim: Any = next(action for action in parser._actions if action.dest == "optim")
    if optim.choices is not None:
        optim.choices = [*optim.choices, *(name for name in OWN_OPTIMIZERS if name not in optim.choices)]
    return parser


def prefixed(settings: Any, prefix: str, lists: tuple[str, ...] = ()) -> Any:
    """
    A dataclass of the fields of another under names with a prefix.

    Args:
        settings (`type`):
            The other dataclass.
        prefix (`str`):
            Prefix of the names.
        lists (`tuple[str]`, *optional*):
            Fields that are lists of whole numbers here, whatever else the other class takes: a parser reads lists.

    Returns:
        `type`
    """
    return make_dataclass(
        f"_Prefixed{settings.__name__}", [_renamed(item, prefix, lists) for item in fields(settings)]
    )


def _renamed(item: Any, prefix: str, lists: tuple[str, ...]) -> tuple[str, Any, Any]:
    if item.name in lists:
        return prefix + item.name, list[int], field(default_factory=lambda: list(item.default), metadata=item.metadata)
    return prefix + item.name, item.type, field(default=item.default, metadata=item.metadata)
