"""Stand-ins of configuration classes, read from their source: names, types, defaults and help without torch.

A stand-in has the fields of its class and no checks. [`StrictParser`] takes it in the class's place, so that a wrong
key is refused, and `--help` printed, before anything heavy is imported. tests/scripts/test_stand_ins.py holds every
command's stand-ins equal to its classes.
"""

import ast
import builtins
import functools
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, make_dataclass
from enum import Enum
from pathlib import Path
from typing import Any


# Modules that are imported as they are: they cost nothing
_IMPORTED = ("abc", "collections", "dataclasses", "enum", "typing")
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
        classes = tuple(_Module(home)[name] for home, name in CLASSES[module.rpartition(".")[2]])
        parser = StrictParser(classes, prog=prog)
    except Exception:  # whatever other versions' source holds that is not foreseen here
        return None
    optim: Any = next(action for action in parser._actions if action.dest == "optim")
    if optim.choices is not None:
        optim.choices = [*optim.choices, *(name for name in OWN_OPTIMIZERS if name not in optim.choices)]
    return parser


def stand_in(module: str, name: str) -> Any:
    """The stand-in of a class in a module."""
    return _Module(module)[name]


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


class _Module(Mapping[str, Any]):
    """Names of a module, each made from the source when it is asked for."""

    def __init__(self, name: str):
        self.name = name

    def __getitem__(self, name: str) -> Any:
        return _value(self.name, name)

    def __iter__(self) -> Iterator[str]:
        return iter(_tree(self.name))

    def __len__(self) -> int:
        return len(_tree(self.name))


class _ClassBody(_Module):
    """Names of a class's body, and behind them those of its module."""

    def __init__(self, name: str, own: dict[str, ast.expr]):
        super().__init__(name)
        self.own = own

    def __getitem__(self, name: str) -> Any:
        return _evaluated(self.own[name], self) if name in self.own else super().__getitem__(name)


@functools.cache
def _tree(module: str) -> dict[str, ast.AST | tuple[str, str]]:
    """Classes, assigned expressions and imports of a module by name, those for type checkers alone among them."""
    path, is_package = _source_of(module)
    found: dict[str, ast.AST | tuple[str, str]] = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            home = _absolute(node, module, is_package)
            found |= {alias.asname or alias.name: (home, alias.name) for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = node.value
    return found


def _source_of(module: str) -> tuple[Path, bool]:
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)  # of a package alone, since it imports the parents of others
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(module)
    path = Path(spec.submodule_search_locations[0]).joinpath(*rest)
    return (path / "__init__.py", True) if path.is_dir() else (path.with_suffix(".py"), False)


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return str(node.module)
    parents = module.split(".")
    parents = parents[: len(parents) - node.level + is_package]
    return ".".join([*parents, *([node.module] if node.module else [])])


@functools.cache
def _value(module: str, name: str) -> Any:
    found = _tree(module).get(name)
    if found is None:
        # A module of a package, such as that of transformers' log levels, whose functions only Python can call
        return getattr(builtins, name) if hasattr(builtins, name) else importlib.import_module(f"{module}.{name}")
    if isinstance(found, tuple):
        home, its_name = found
        if home.split(".")[0] in _IMPORTED or home == __name__:
            return getattr(importlib.import_module(home), its_name)
        return _value(home, its_name)
    if isinstance(found, ast.ClassDef):
        return _stand_in(found, module)
    return _evaluated(found, _Module(module))


def _evaluated(expression: ast.AST, names: Mapping[str, Any]) -> Any:
    code = compile(ast.Expression(expression), "<stand-in>", "eval")  # type: ignore[arg-type]
    return eval(code, {}, names)  # our own and the installed libraries' source, which an import would run too


def _stand_in(node: ast.ClassDef, module: str) -> type:
    names = [base.id for base in node.bases if isinstance(base, ast.Name)]
    body = [statement for top in node.body for statement in _statements(top)]
    assigned = {
        statement.targets[0].id: statement.value
        for statement in body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    if any(name.endswith("Enum") for name in names):
        return Enum(node.name, {name: ast.literal_eval(value) for name, value in assigned.items()})  # type: ignore
    bases = tuple(_evaluated(base, _Module(module)) for base in node.bases)
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return type(node.name, bases, {"__module__": module})
    inside = _ClassBody(module, assigned)
    items: list[Any] = []
    for statement in body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            hint = _evaluated(statement.annotation, inside)
            default = () if statement.value is None else (_evaluated(statement.value, inside),)
            items.append((statement.target.id, hint, *default))
    return make_dataclass(node.name, items, bases=bases, namespace={"__module__": module})


def _statements(node: ast.stmt) -> Iterator[ast.stmt]:
    """A statement of a class's body, or those under its conditions: of several assignments the last one holds."""
    if isinstance(node, ast.If):
        for inner in node.body:
            yield from _statements(inner)
    else:
        yield node
