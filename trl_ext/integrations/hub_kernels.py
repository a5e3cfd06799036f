"""Lays AdamP and SGDP with their Triton and C kernels out as a kernel of the Hub, which needs torch alone.

python -m trl_ext.integrations.hub_kernels --output_dir DIR

The folder has what `kernel-builder` takes (`build.toml`, `torch-ext/`) and what `kernels.get_local_kernel(DIR)` and,
after an upload, `kernels.get_kernel(REPOSITORY)` load: `build/torch-cpu` and `build/torch-cuda`, the same sources,
since Triton and this package's C are compiled on first use. Nothing is written for it: the modules are those that
[`~trl_ext.optim.AdamP`] imports, at their places, so that this package's own kernels and the Hub's are one source.
"""

import argparse
import ast
import hashlib
import json
import shutil
from pathlib import Path

import trl_ext
from trl_ext._version import __version__


NAME = "trl-ext-adamp"
BACKENDS = ("cpu", "cuda")
ENTRIES = ("optim/adamp.py", "optim/sgdp.py")
ROOT = Path(trl_ext.__file__).parent
# Beside the modules: compiled on first use
DATA = tuple(sorted(str(path.relative_to(ROOT)) for path in (ROOT / "optim" / "kernels").glob("*.[ch]")))
INIT = '''"""AdamP and SGDP (https://huggingface.co/papers/2006.08217), of trl_ext {version}."""

from .optim.adamp import AdamP
from .optim.sgdp import SGDP


__all__ = ["SGDP", "AdamP"]
'''
CARD = """---
library_name: kernels
license: apache-2.0
---

# AdamP and SGDP

The optimizers of [Slowing Down the Weight Norm Increase in Momentum-based
Optimizers](https://huggingface.co/papers/2006.08217), of `trl_ext` {version}: Triton kernels on a GPU, C on a CPU,
blocks of torch operations elsewhere.

```python
from kernels import get_kernel

adamp = get_kernel("YOUR_NAME/trl-ext-adamp", version=1, trust_remote_code=True)
optimizer = adamp.AdamP(model.parameters(), lr=1e-3, weight_decay=0.01)
```
"""


def modules_of(entries: tuple[str, ...] = ENTRIES) -> list[str]:
    """
    The modules of this package that some of them import, themselves too, at their top and inside functions.

    Args:
        entries (`tuple[str, ...]`, *optional*):
            Paths of modules within the package.

    Returns:
        `list[str]`: Paths within the package, sorted.

    Raises:
        ValueError: If one imports this package by its name, under which a kernel has no modules.
    """
    found: set[str] = set()
    waiting = list(entries)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported_by(path)
    return sorted(found)


def _imported_by(path: str) -> list[str]:
    imported = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = Path(path).parents[node.level - 1] / module.replace(".", "/")
            own = [str(folder / f"{name}.py") for name in names if (ROOT / folder / f"{name}.py").is_file()]
            imported += own or [str(folder.with_suffix(".py"))]
        elif any(name.partition(".")[0] == "trl_ext" for name in [module, *names]):
            raise ValueError(f"{path} imports `trl_ext` by its name; a kernel of the Hub can only import relatively.")
    return imported


def build(output_dir: str | Path) -> Path:
    """
    Writes the layout; a folder that holds something else is refused.

    Args:
        output_dir (`str` or `Path`):
            Folder, replaced if it is a layout already.

    Returns:
        `Path`: The folder.

    Raises:
        FileExistsError: If the folder holds something else.
    """
    folder = Path(output_dir)
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "build.toml").is_file() or NAME not in (folder / "build.toml").read_text(encoding="utf-8"):
            raise FileExistsError(f"{folder} holds something else. Name another folder as `output_dir`.")
        shutil.rmtree(folder)
    source = folder / "torch-ext" / NAME.replace("-", "_")
    for path in [*modules_of(), *DATA]:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, source / path)
    for package in {path.parent for path in source.rglob("*.py")} - {source}:
        (package / "__init__.py").touch()  # those of this package import more
    (source / "__init__.py").write_text(INIT.format(version=__version__), encoding="utf-8")
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    (folder / "build.toml").write_text(
        f'[general]\nname = "{NAME}"\nversion = 1\nedition = 5\nlicense = "Apache-2.0"\nbackends = [{backends}]\n\n'
        "[torch-noarch]\n",
        encoding="utf-8",
    )
    (folder / "README.md").write_text(CARD.format(version=__version__), encoding="utf-8")
    digest = _digest(source)
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(source, variant)
        metadata = {
            "id": f"_{NAME.replace('-', '_')}_{backend}_{digest[:8]}", "name": NAME, "version": 1,
            "license": "Apache-2.0", "python-depends": [], "backend": {"type": backend},
        }  # fmt: skip
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return folder


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """
    The command line.

    Args:
        arguments (`list[str]`, *optional*):
            Defaults to the process's.

    Returns:
        `int`: The exit status.
    """
    parser = argparse.ArgumentParser(
        "python -m trl_ext.integrations.hub_kernels",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--output_dir", required=True, help="folder that becomes the kernel's repository")
    folder = build(parser.parse_args(arguments).output_dir)
    print(f"Written to {folder}. Upload it with: hf upload --repo-type kernel YOUR_NAME/{NAME} {folder}")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
