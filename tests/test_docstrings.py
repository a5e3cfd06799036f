"""Docstrings say what signatures say: the same arguments, in the same order, with the same defaults."""

import ast
import re
from pathlib import Path

import pytest

import trl_ext


ROOT = Path(trl_ext.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
SECTION = re.compile(r"^([ \t]*)(?:Args|Parameters):[ \t]*$", re.MULTILINE)
ENTRY = re.compile(r"^([\w, *`]+?)(?: \((.*)\))?:(.*)$")


def documented(docstring):
    """Arguments that a docstring lists: name to its text in parentheses; `None` without such a section."""
    start = SECTION.search(docstring)
    if start is None:
        return None
    indent, found = len(start[1]), {}
    for line in docstring[start.end() :].splitlines()[1:]:
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth <= indent:
            break
        match = ENTRY.match(line.strip())
        if match and depth == indent + 4:
            found |= {name.strip(" `*"): match[2] or "" for name in match[1].split(",")}
    return found


def arguments(function):
    """Arguments of a function: name to its default as source, `None` where it has none."""
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(positional) - len(spec.defaults)) + spec.defaults
    pairs = [*zip(positional, defaults, strict=True), *zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
    if pairs and pairs[0][0].arg in ("self", "cls") and positional:
        pairs = pairs[1:]
    return {a.arg: None if d is None else ast.unparse(d) for a, d in pairs}


def rest(function):
    """The names of `*args` and `**kwargs`, which a docstring may list anywhere."""
    return {extra.arg for extra in (function.args.vararg, function.args.kwarg) if extra is not None}


def definitions(tree):
    """Every class and function with what its docstring describes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node, node
        elif isinstance(node, ast.ClassDef):
            init = next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"), None)
            if init is not None:
                yield node, init


def faults(source):
    """What docstrings and signatures of a module disagree on."""
    found = []
    for owner, function in definitions(ast.parse(source)):
        docstring = ast.get_docstring(owner)
        listed = documented(docstring) if docstring else None
        if listed is None:
            continue
        own = arguments(function)
        names = [name for name in own if not name.startswith("_")]
        more = rest(function)
        if [name for name in listed if name not in more] != names or not more <= listed.keys() | {"_"}:
            found.append(f"{owner.name}: lists {list(listed)}, takes {names}")
            continue
        for name, text in listed.items() - {(name, listed.get(name)) for name in more}:
            default, stated = own[name], re.search(r"defaults to `(.*)`", text)
            optional = "*optional*" in text
            if default is not None and not optional:
                found.append(f"{owner.name}: `{name}` has the default {default} and is not called optional")
            if default is None and (optional or stated):
                found.append(f"{owner.name}: `{name}` has no default and is called optional")
            if stated and default is not None and same(stated[1]) != same(default):
                found.append(f"{owner.name}: `{name}` defaults to {default}, the docstring says {stated[1]}")
    return found


def same(value):
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arguments(path):
    assert faults(path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_functions_have_one_line(path):
    long = [
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_") and not node.name.endswith("__")
        and "\n" in (ast.get_docstring(node) or "")
    ]  # fmt: skip
    assert long == []


def test_faults_are_seen():
    source = '''
def f(a, b=1):
    """
    Args:
        a (`int`, *optional*):
            First.
        b (`int`, *optional*, defaults to `2`):
            Second.
    """
def g(a, b):
    """
    Args:
        b (`int`):
            Second.
    """
'''
    assert len(faults(source)) == 3
