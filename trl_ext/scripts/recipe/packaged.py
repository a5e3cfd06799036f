"""The recipes that come with the package: `recipes/` of a clone, which the wheel carries as `trl_ext/recipes/`."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple


_PACKAGE = Path(__file__).resolve().parents[2]


def recipes_folder() -> Path:
    """
    The folder of the recipes.

    Raises:
        FileNotFoundError: If the installation has none.
    """
    for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):
        if (folder / "sparse_po").is_dir():
            return folder
    raise FileNotFoundError(f"{_PACKAGE} is installed without recipes. Install trl-ext's wheel or its clone anew.")


def packaged_recipes() -> dict[str, Path]:
    """Name, such as `sparse_po/playground`, and file of every recipe; experiments are none."""
    paths = sorted(recipes_folder().glob("*/*.yaml"))
    return {f"{path.parent.name}/{path.stem}": path for path in paths}


def find_packaged(name: str | Path) -> Path | None:
    """The packaged file of a name as in `packaged_recipes`, with or without `recipes/` and an ending; else `None`."""
    try:
        folder = recipes_folder()
    except FileNotFoundError:
        return None
    relative = str(name).removeprefix("recipes/")
    found = [(folder / file).resolve() for file in (relative, f"{relative}.yaml")]
    return next((path for path in found if path.is_file() and path.is_relative_to(folder)), None)


class Header(NamedTuple):
    """
    What the comment at the head of a recipe says.

    Args:
        title (`str`):
            What it is for, its first line.
        command (`str`):
            Command that runs it, such as `trl-ext sparse-po`; empty where none stands there.
        hardware (`str`):
            What it needs; empty where nothing stands there.
    """

    title: str
    command: str
    hardware: str


def header_of(path: Path) -> Header:
    """The header of a recipe's file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    command = re.search(r"^# Run: +(trl-ext \S+|python -m)", text, re.MULTILINE)
    # To its end, or to what it says further
    hardware = re.search(r"^# Hardware: +(.+?)(?=;|\. |\n)", text, re.MULTILINE)
    return Header(
        title=text.split("\n", 1)[0].removeprefix("#").strip(),
        command=command[1] if command else "",
        hardware=hardware[1] if hardware else "",
    )


def read_packaged(name: str) -> str:
    """
    The text of a packaged recipe.

    Raises:
        ValueError: If there is no such recipe.
    """
    return _packaged(name).read_text(encoding="utf-8")


def closest_packaged(name: str) -> str:
    """A question that names the packaged recipe closest to a name, with a space before it; empty where none is."""
    relative = name.removeprefix("recipes/").removesuffix(".yaml")
    try:
        close = get_close_matches(relative, packaged_recipes(), n=1, cutoff=0.7)
    except FileNotFoundError:
        return ""
    return f" Did you mean `{close[0]}`?" if close else ""


def _packaged(name: str) -> Path:
    path = find_packaged(name)
    if path is None:
        raise ValueError(
            f"{name} is not a recipe of the package.{closest_packaged(name)} `trl-ext recipes` lists them."
        )
    return path


def copy_recipe(name: str, folder: Path) -> list[Path]:
    """
    Copies a recipe, and what it names beside itself, such as a DeepSpeed config; the copy names the copies.

    Args:
        name (`str`):
            Name or packaged path of the recipe.
        folder (`Path`):
            Where to; it is made.

    Returns:
        `list[Path]`: the new files, the recipe first.

    Raises:
        ValueError: If there is no such recipe.
        FileExistsError: If a file is there already.
    """
    source = _packaged(name)
    text, method = source.read_text(), source.parent.name
    beside = [path for path in sorted(source.parent.glob("*.json")) if f"recipes/{method}/{path.name}" in text]
    copies = {path: folder / path.name for path in (source, *beside)}
    for copy in copies.values():
        if copy.exists():
            raise FileExistsError(f"{copy} is there already. Name another folder, or move the file away.")
    folder.mkdir(parents=True, exist_ok=True)
    for path, copy in copies.items():
        content = path.read_text()
        for other, its_copy in copies.items():
            content = content.replace(f"recipes/{method}/{other.name}", str(its_copy))
        copy.write_text(content)
    return list(copies.values())
