"""Lays this package's Triton and C kernels out as kernels of the Hub, which need torch alone.

python -m trl_ext.integrations.hub_kernels --output_dir DIR [--kernel NAME]

`trl-ext-adamp` is AdamP and SGDP, `trl-ext-paired-log-probs` the tiles of SparsePO's head. The folder has what
`kernel-builder` takes (`build.toml`, `torch-ext/`) and what `kernels.get_local_kernel(DIR)` and, after an upload,
`kernels.get_kernel(REPOSITORY)` load: `build/torch-cpu` and `build/torch-cuda`, the same sources, since Triton and
this package's C are compiled on first use. Nothing is written for it: the modules are those that the entries import,
at their places, so that this package's own kernels and the Hub's are one source.
[`~trl_ext.core.hub_kernel.kernel_of_hub`] runs them in the place of the own ones.
"""

import argparse
import ast
import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import trl_ext
from trl_ext._version import __version__


BACKENDS = ("cpu", "cuda")
ROOT = Path(trl_ext.__file__).parent


class Layout(NamedTuple):
    """
    A kernel.

    Attributes:
        name (`str`): Its name.
        version (`int`): Its version on the Hub, raised where what it has changes.
        entries (`tuple[str, ...]`): Modules that it hands out; they bring what they import.
        data (`tuple[str, ...]`): Files beside the modules.
        init (`str`): Its `__init__.py`.
        card (`str`): Its `README.md`, with `{version}` for this package's version.
    """

    name: str
    version: int
    entries: tuple[str, ...]
    data: tuple[str, ...]
    init: str
    card: str


ADAMP = Layout(
    name="trl-ext-adamp",
    version=1,
    entries=("optim/adamp.py", "optim/sgdp.py"),
    # Compiled on first use
    data=tuple(sorted(str(path.relative_to(ROOT)) for path in (ROOT / "optim" / "kernels").glob("*.[ch]"))),
    init='''"""AdamP and SGDP (https://huggingface.co/papers/2006.08217), of trl_ext {version}."""

from .optim.adamp import AdamP
from .optim.sgdp import SGDP


__all__ = ["SGDP", "AdamP"]
''',
    card="""---
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
""",
)
PAIRED_LOG_PROBS = Layout(
    name="trl-ext-paired-log-probs",
    version=1,
    entries=("sparse_po/lm_head/triton_kernels.py",),
    data=(),
    init='''"""Log-probabilities and KL of two models from tiles of their logits, in Triton, of trl_ext {version}."""

from .sparse_po.lm_head.triton_kernels import INTERFACE, VERSION, Running, Side, fold, logit_gradient_


__all__ = ["INTERFACE", "VERSION", "Running", "Side", "fold", "logit_gradient_"]
''',
    card="""---
library_name: kernels
license: apache-2.0
---

# Paired log-probabilities

Log-probabilities of labels under a policy and a reference model, and the KL over the whole vocabulary, from tiles of
their projections: what [SparsePO](https://huggingface.co/papers/2410.05102) needs of every token, of `trl_ext`
{version}. `fold` reads each tile of both once, in its own dtype, and sums in float32; `logit_gradient_` writes the
gradient in its place. Bias, scale and soft-capping are applied in registers. Triton runs it, on a GPU.

```python
import torch
from kernels import get_kernel

paired = get_kernel("YOUR_NAME/trl-ext-paired-log-probs", version=1, trust_remote_code=True)


def log_probs_and_kl(hidden, weight, ref_hidden, ref_weight, labels, tile=32768):
    def full(value):
        return torch.full(labels.shape, value, device=labels.device)

    lowest, zeros = (full(-torch.inf) for _ in range(2)), (full(0.0) for _ in range(7))
    sums = paired.Running(*lowest, *zeros)
    for start in range(0, len(weight), tile):
        policy, ref = hidden @ weight[start : start + tile].T, ref_hidden @ ref_weight[start : start + tile].T
        paired.fold(
            paired.Side(policy, None, 1.0, None), paired.Side(ref, None, 1.0, None), sums, labels, start
        )
    normalizer, ref_normalizer = sums.policy_max + sums.policy_sum.log(), sums.ref_max + sums.ref_sum.log()
    kl = sums.gap_weighted / sums.ref_sum - ref_normalizer + normalizer
    return sums.policy_label - normalizer, sums.ref_label - ref_normalizer, kl
```
""",
)
LAYOUTS = {layout.name: layout for layout in (ADAMP, PAIRED_LOG_PROBS)}


def modules_of(entries: tuple[str, ...]) -> list[str]:
    """
    The modules of this package that some of them import, themselves too, at their top and inside functions.

    Args:
        entries (`tuple[str, ...]`):
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


def build(output_dir: str | Path, layout: Layout = ADAMP) -> Path:
    """
    Writes the layout; a folder that holds something else is refused.

    Args:
        output_dir (`str` or `Path`):
            Folder, replaced if it is the same kernel's layout already.
        layout ([`Layout`], *optional*, defaults to `ADAMP`):
            Kernel.

    Returns:
        `Path`: The folder.

    Raises:
        FileExistsError: If the folder holds something else.
    """
    folder = Path(output_dir)
    general = f'[general]\nname = "{layout.name}"\n'
    if folder.exists() and any(folder.iterdir()):
        file = folder / "build.toml"
        if not file.is_file() or not file.read_text(encoding="utf-8").startswith(general):
            raise FileExistsError(f"{folder} holds something else. Name another folder as `output_dir`.")
        shutil.rmtree(folder)
    source = folder / "torch-ext" / layout.name.replace("-", "_")
    for path in [*modules_of(layout.entries), *layout.data]:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, source / path)
        for package in (source / path).relative_to(source).parents:
            (source / package / "__init__.py").touch()  # those of this package import more
    (source / "__init__.py").write_text(layout.init.replace("{version}", __version__), encoding="utf-8")
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    (folder / "build.toml").write_text(
        f'{general}version = {layout.version}\nedition = 5\nlicense = "Apache-2.0"\nbackends = [{backends}]\n\n'
        "[torch-noarch]\n",
        encoding="utf-8",
    )
    (folder / "README.md").write_text(layout.card.replace("{version}", __version__), encoding="utf-8")
    digest = _digest(source)
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(source, variant)
        metadata = {
            "id": f"_{layout.name.replace('-', '_')}_{backend}_{digest[:8]}", "name": layout.name,
            "version": layout.version, "license": "Apache-2.0", "python-depends": [], "backend": {"type": backend},
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
    parser.add_argument("--kernel", choices=LAYOUTS, default=ADAMP.name, help="defaults to %(default)s")
    options = parser.parse_args(arguments)
    folder = build(options.output_dir, LAYOUTS[options.kernel])
    upload = f"hf upload --repo-type kernel YOUR_NAME/{options.kernel} {folder}"
    print(f"Written to {folder}. Upload it with: {upload}")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
