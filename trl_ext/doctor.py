"""`trl-ext doctor`: whether an installation can train, and what of the machine it will use."""

import importlib
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psutil
from packaging.requirements import Requirement
from rich.console import Console

from .core.quiet import quiet_libraries


OK, NOTE, FAULT = "ok", "note", "fault"
_USAGE = """usage: trl-ext doctor

Checks versions against their ranges, what is taken from other libraries,
devices, DeepSpeed, compilers, memory, disks and caches. The status is 1 where
something is at fault."""
# What `transformers`, `datasets` and the hub's library write to
_LEAST_DISK = 5e9


class Finding(NamedTuple):
    """
    One line of the report.

    Args:
        level (`str`):
            `"ok"`, `"note"` (works, but say you knew) or `"fault"` (something will fail).
        topic (`str`):
            What it is about, in one word or two.
        text (`str`):
            What was found and, for a fault, the remedy.
    """

    level: str
    topic: str
    text: str


def main(arguments: list[str]) -> int:
    """
    Prints the report.

    Args:
        arguments (`list[str]`):
            `--help`, or none.

    Returns:
        `int`: 1 if something is at fault, else 0.

    Raises:
        ValueError: If there are arguments.
    """
    if arguments in (["--help"], ["-h"]):
        print(_USAGE)  # noqa: T201
        return 0
    if arguments:
        raise ValueError(f"it takes no arguments, got {' '.join(arguments)}.")
    console = Console(markup=False, highlight=False, soft_wrap=True)
    faults = 0
    for title, check in CHECKS.items():
        console.print(title)
        with quiet_libraries():
            findings = list(_safely(title, check))
        for finding in findings:
            faults += finding.level == FAULT
            head = f"  {finding.level:<5} {finding.topic:<16} "
            console.print(textwrap.fill(finding.text, 80, initial_indent=head, subsequent_indent=" " * len(head)))
    console.print(f"{faults} fault{'s' * (faults != 1)}." if faults else "No faults.")
    return int(faults > 0)


def _safely(title: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that itself fails is a finding."""
    try:
        yield from check()
    except Exception as error:  # whatever a broken installation raises
        yield Finding(FAULT, title.lower(), f"{type(error).__name__}: {str(error)[:300]}")


def check_versions() -> Iterator[Finding]:
    """The interpreter and every package against the range that this package states; extras where installed."""
    from . import __version__

    yield Finding(OK, "trl_ext", __version__)
    yield Finding(OK, "python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    missing: dict[str, list[str]] = {}
    seen: set[str] = set()
    for text in requires("trl-ext") or ():
        requirement = Requirement(text)
        extra = next((name for name in _EXTRAS if requirement.marker and f'"{name}"' in str(requirement.marker)), None)
        if requirement.marker and extra is None:
            continue  # of the tests
        if requirement.name in seen:
            continue  # of two extras
        seen.add(requirement.name)
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            if extra:
                missing.setdefault(extra, []).append(requirement.name)
            else:
                yield Finding(
                    FAULT, requirement.name, f'missing: pip install "{requirement.name}{requirement.specifier}"'
                )
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            yield Finding(OK, requirement.name, f"{installed} ({requirement.specifier or 'any'})")
        else:
            yield Finding(
                FAULT, requirement.name,
                f'{installed} is outside of {requirement.specifier}: '
                f'pip install "{requirement.name}{requirement.specifier}"',
            )  # fmt: skip
    for extra, names in missing.items():
        yield Finding(NOTE, f"[{extra}]", f'not installed: {", ".join(names)} (pip install "trl-ext[{extra}]")')


_EXTRAS = ("deepspeed", "dialog", "peft", "proxy-points", "search")


def check_seams() -> Iterator[Finding]:
    """Every name of other libraries that this package takes beyond their documentation."""
    from . import _upstream

    broken = []
    for name in _upstream.__all__:
        try:
            getattr(_upstream, name)
        except (ImportError, AttributeError) as error:
            broken.append(f"{name} ({error})")
    for text in broken:
        yield Finding(FAULT, "seam", f"{text}: install versions of the ranges above")
    if not broken:
        yield Finding(OK, "seams", f"all {len(_upstream.__all__)} names of other libraries are there")
    for name in ("SparsePOTrainer", "ConstrainedPPOTrainer", "EPRewardTrainer"):
        try:
            getattr(importlib.import_module("trl_ext"), name)
        except Exception as error:  # whatever its parents raise with other versions
            yield Finding(FAULT, name, f"cannot be imported: {type(error).__name__}: {str(error)[:300]}")
        else:
            yield Finding(OK, name, "can be imported")


def check_devices() -> Iterator[Finding]:
    """GPUs as torch sees them."""
    import torch

    yield Finding(OK, "torch", f"{torch.__version__}, built for {_build_of(torch)}")
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        if driver and torch.version.cuda is None:
            yield Finding(NOTE, "GPU", "nvidia-smi is here, and torch is built without CUDA: install a build with it")
        else:
            yield Finding(
                NOTE, "GPU", "none: recipes need `use_cpu: true` and `bf16: false`, or train on a CPU slowly"
            )
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = (
            f"{found.name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, capability {found.major}.{found.minor}"
        )
        yield Finding(OK if free > 0.5 * total else NOTE, f"GPU {index}", text)
    if not torch.cuda.is_bf16_supported():
        yield Finding(NOTE, "bf16", "not supported by this GPU: set `bf16: false` and `fp16: true`")


def _build_of(torch: object) -> str:
    versions = vars(getattr(torch, "version"))  # noqa: B009
    return next((f"{kind} {versions[kind]}" for kind in ("cuda", "hip", "xpu") if versions.get(kind)), "CPUs")


def check_launching() -> Iterator[Finding]:
    """What `accelerate launch` and DeepSpeed find."""
    from accelerate.commands.config.config_args import default_config_file

    from .launcher import accelerate_configs

    yield Finding(OK, "accelerate", f"{len(accelerate_configs())} packaged configs: {', '.join(accelerate_configs())}")
    if Path(default_config_file).is_file():
        yield Finding(NOTE, "default config", f"{default_config_file} is used by a bare `accelerate launch` alone")
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        yield Finding(NOTE, "deepspeed", "not installed: the zero configs need it")
        return
    importlib.import_module("deepspeed")
    yield Finding(OK, "deepspeed", f"{installed} can be imported")
    if not shutil.which("ninja"):
        yield Finding(NOTE, "ninja", "not found: DeepSpeed cannot build its operators, as offloading needs")
    if _gpus() == 0 and os.environ.get("DS_ACCELERATOR") != "cpu":
        yield Finding(NOTE, "DS_ACCELERATOR", "unset: cpu_zero2 and cpu_zero3 need DS_ACCELERATOR=cpu")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_compilers() -> Iterator[Finding]:
    """The compiled kernels of the optimizers, and Triton."""
    from .optim.kernels.compilation import _build

    library = _build()
    if isinstance(library, str):
        yield Finding(NOTE, "C kernels", f"AdamP on a CPU uses torch's own: {library}")
    else:
        yield Finding(OK, "C kernels", "AdamP on a CPU uses compiled ones")
    try:
        yield Finding(OK, "triton", f"{version('triton')}: kernels on GPUs")
    except PackageNotFoundError:
        yield Finding(
            FAULT if _gpus() else NOTE, "triton", "not installed; kernels on GPUs need it: pip install triton"
        )
    yield from _kernels_of_the_hub()


def _kernels_of_the_hub() -> Iterator[Finding]:
    """What the environment names; nothing is loaded."""
    from .core.hub_kernel import KERNELS_VARIABLE, named_kernels

    try:
        named = named_kernels()
    except ValueError as error:
        yield Finding(FAULT, "kernels", str(error))
        return
    if named and find_spec("kernels") is None:
        yield Finding(FAULT, "kernels", f"{KERNELS_VARIABLE} is set and `kernels` not installed: pip install kernels")
    for name, place in named.items():
        yield Finding(OK, "kernels", f"{name} of {place} on a GPU, if it fits")


def check_machine() -> Iterator[Finding]:
    """Cores, memory and disk."""
    memory = psutil.virtual_memory()
    yield Finding(OK, "cores", f"{len(psutil.Process().cpu_affinity() or ()) or os.cpu_count()} for this process"
                  f"; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")  # fmt: skip
    text = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    yield Finding(OK if memory.available > 2 * 2**30 else NOTE, "memory", text)
    yield _disk("working folder", Path.cwd())


def check_caches() -> Iterator[Finding]:
    """Where models and data sets are kept, and whether the hub may be asked."""
    from huggingface_hub import constants

    yield _disk("hub cache", Path(constants.HF_HUB_CACHE))
    data = os.environ.get("HF_DATASETS_CACHE")
    if data:
        yield _disk("data set cache", Path(data))
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name)
    ]
    if constants.HF_HUB_OFFLINE or offline:
        yield Finding(NOTE, "hub", f"{', '.join(offline) or 'HF_HUB_OFFLINE'} is set: only what is cached is found")
    else:
        yield Finding(OK, "hub", f"{constants.ENDPOINT} is asked for what is not cached")


def _disk(topic: str, folder: Path) -> Finding:
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        return Finding(FAULT, topic, f"{folder} cannot be written to: name another in HF_HOME, or change its rights")
    return Finding(OK if free > _LEAST_DISK else NOTE, topic, f"{folder}, {free / 1e9:.0f} GB free")


# Title: check; what needs no import comes first
CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Versions": check_versions,
    "Machine": check_machine,
    "Caches": check_caches,
    "Devices": check_devices,
    "Launching": check_launching,
    "Compilers": check_compilers,
    "Contracts": check_seams,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
