"""Reading a recipe's file: bounded in size, depth and time, with the line of every key; errors name file and line."""

import codecs
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ...core.checks import shown
from .packaged import closest_packaged, find_packaged


# Far above any recipe; what is larger was not written by hand
MAX_BYTES = 1_000_000
MAX_VALUES = 5_000
MAX_DEPTH = 40
_MERGE = "tag:yaml.org,2002:merge"
# UTF-32's marks begin with UTF-16's
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip
Lines = dict[tuple[str | int, ...], int]


class RecipeError(ValueError):
    """A recipe or command line that cannot be run as written."""


def read_recipe(path: str | Path) -> tuple[dict[str, Any], Lines]:
    """
    Reads a recipe.

    Args:
        path (`str` or `Path`):
            YAML file with a mapping, or the name of a packaged recipe, such as `sparse_po/playground`.

    Returns:
        `tuple[dict[str, Any], dict]`: the recipe, and the line of each key and entry by its place, such as
        `("datasets", 0, "path")`.

    Raises:
        RecipeError: If it is no file, not UTF-8, no YAML mapping, has a key twice, or is too large or too deep.
    """
    file = Path(path) if _is_file(path) else find_packaged(path)
    if file is None:
        hint = closest_packaged(str(path))
        raise RecipeError(f"`--config {path}` is not a file.{hint} `trl-ext recipes` lists the recipes.")
    recipe, lines = parse_yaml(_text(file), str(path))
    if not isinstance(recipe, dict):
        raise RecipeError(f"The recipe {path} must be a mapping of arguments to values, got {type(recipe).__name__}.")
    # A packaged recipe names a packaged DeepSpeed config
    found = {key: _packaged_file(value) if key == "deepspeed" else value for key, value in recipe.items()}
    return found, lines


def parse_yaml(text: str, name: str) -> tuple[Any, Lines]:
    """
    The value of a YAML text and the line of each key and entry.

    Args:
        text (`str`):
            The text.
        name (`str`):
            What errors call it.

    Returns:
        `tuple[Any, dict]`

    Raises:
        RecipeError: As [`read_recipe`] does.
    """
    lines: Lines = {}
    try:
        loader = _Loader(text, name)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _note_lines(node, (), lines)
        return loader.construct_document(node), lines
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"The recipe {name}, line {line}, has a sign that YAML does not allow ({error.character!r}). Remove it."
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe {name} is not valid YAML: {error}") from error


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        return False


def _text(file: Path) -> str:
    """The text of a file that is UTF-8, with or without its mark."""
    try:
        size = file.stat().st_size
        data = file.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise RecipeError(f"The recipe {file} cannot be read: {error.strerror}.") from error
    if size > MAX_BYTES:
        raise RecipeError(
            f"The recipe {file} has {size:,} bytes, and a recipe at most {MAX_BYTES:,}. Move data into a file."
        )
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            raise RecipeError(f"The recipe {file}, line 1, is {encoding} text. Save it as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"The recipe {file}, line {line}, is not UTF-8 text: it has the byte 0x{data[error.start]:02x}. Save it "
            "as UTF-8."
        ) from None
    return text


def _packaged_file(value: Any) -> Any:
    if not isinstance(value, str) or _is_file(value):
        return value
    return str(find_packaged(value) or value)


def _note_lines(node: yaml.Node, place: tuple[str | int, ...], lines: Lines) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                lines[(*place, key.value)] = key.start_mark.line + 1
                _note_lines(value, (*place, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            lines[(*place, index)] = entry.start_mark.line + 1
            _note_lines(entry, (*place, index), lines)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses repeated keys, and text whose values are too many, too deep or endless."""

    def __init__(self, text: str, name: str):
        super().__init__(text)
        self.name = name
        self._depth = self._count = 0
        # Values below each anchor, which each of its aliases stands for once more
        self._weights: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._weights:
                raise yaml.YAMLError(f"an alias inside of its own anchor{event.start_mark}")
            self._add(self._weights.get(str(event.anchor), 0), event.start_mark)
            return super().compose_node(parent, index)
        before, self._depth = self._count, self._depth + 1
        if self._depth > MAX_DEPTH:
            raise yaml.YAMLError(f"values nested more than {MAX_DEPTH} deep{event.start_mark}")
        self._add(1, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._weights[event.anchor] = self._count - before
        return node

    def _add(self, count: int, mark: Any) -> None:
        self._count += count
        if self._count > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES:,} values, those of aliases counted each time{mark}")

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # PyYAML lets through what `int`, `date` and its own indexing raise
            tag = node.tag.rpartition(":")[2]
            raise yaml.YAMLError(
                f"{shown(str(node.value))} is no {tag} ({type(error).__name__}); quote it if it is a text"
                f"{node.start_mark}"
            ) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = "<<" if key_node.tag == _MERGE else self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(f"a key that is a {type(key).__name__}{key_node.start_mark}")
            if key in seen:
                raise yaml.YAMLError(
                    f"{shown(key)} given twice, first in line {seen[key]}; keep one{key_node.start_mark}"
                )
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)
