"""Classes of a module made anew from its source, without importing it: the fields of dataclasses, and enumerations."""

import ast
import builtins
import functools
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import make_dataclass
from enum import Enum
from pathlib import Path
from typing import Any


# Modules that are imported as they are: they cost nothing
_IMPORTED = ("abc", "collections", "dataclasses", "enum", "typing")
# The one of this package's whose functions make classes
_MAKER = f"{__package__}.stand_ins"


def stand_in(module: str, name: str) -> Any:
    """The stand-in of a class in a module."""
    return _Module(module)[name]


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
        if home.split(".")[0] in _IMPORTED or home == _MAKER:
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
    made = make_dataclass(node.name, items, bases=bases)
    made.__module__ = module  # Python 3.12 overwrites what a namespace says of it
    return made


def _statements(node: ast.stmt) -> Iterator[ast.stmt]:
    """A statement of a class's body, or those under its conditions: of several assignments the last one holds."""
    if isinstance(node, ast.If):
        for inner in node.body:
            yield from _statements(inner)
    else:
        yield node
