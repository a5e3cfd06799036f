"""Packages and the description of a package page, which pyproject.toml cannot state.

`recipes/` is the package `trl_ext.recipes`: the wheel carries it, and there is one copy. The README's links into the
repository lead nowhere on a package page: they become absolute where `project.urls` has a `Source`, and plain text
where it has none.
"""

import re
import tomllib
from pathlib import Path

from setuptools import find_namespace_packages, setup


ROOT = Path(__file__).parent
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)")


def package_page(readme: str, source: str | None) -> str:
    """A README whose links do not depend on the folder that it is shown in."""
    return _LINK.sub(rf"[\1]({source.rstrip('/')}/blob/main/\2)" if source else r"\1", readme)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        packages=[*find_namespace_packages(include=["trl_ext*"]), "trl_ext.recipes"],
        long_description=package_page((ROOT / "README.md").read_text(encoding="utf-8"), project["urls"].get("Source")),
        long_description_content_type="text/markdown",
    )
