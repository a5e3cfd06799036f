"""Triton kernels of the Hub in the place of this package's own, for those who name them in the environment.

TRL_EXT_HUB_KERNELS="trl-ext-paired-log-probs=OWNER/REPOSITORY@COMMIT,trl-ext-adamp=FOLDER"

Without the variable nothing is looked for. What cannot be loaded, or does not fit the code that calls it, is left
aside with one line in the log, and this package's own kernels run.
"""

import importlib
import importlib.util
import inspect
import logging
import os
import re
from difflib import get_close_matches
from enum import EnumMeta
from pathlib import Path
from types import ModuleType
from typing import Any


KERNELS_VARIABLE = "TRL_EXT_HUB_KERNELS"
# Kernels that this package calls, by the names under which `trl_ext.integrations.hub_kernels` lays them out
NAMES = ("trl-ext-adamp", "trl-ext-paired-log-probs")
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})")
_PACKAGE = __name__.partition(".")[0]

logger = logging.getLogger(__name__)


def named_kernels() -> dict[str, str]:
    """
    What the environment names.

    Returns:
        `dict[str, str]`: names and where each is, a repository with its commit or a folder; none without the variable.

    Raises:
        ValueError: If an entry is no such pair.
    """
    entries = [entry.strip() for entry in os.environ.get(KERNELS_VARIABLE, "").split(",")]
    return dict(_pair(entry) for entry in entries if entry)


def _pair(entry: str) -> tuple[str, str]:
    name, _, place = (part.strip() for part in entry.partition("="))
    if name not in NAMES:
        close = get_close_matches(name, NAMES, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        raise ValueError(f"`{KERNELS_VARIABLE}` names {name!r}, and the kernels are {', '.join(NAMES)}.{hint}")
    if not _REPOSITORY.fullmatch(place) and not Path(place).is_dir():
        raise ValueError(
            f"`{KERNELS_VARIABLE}` has {place!r} for {name}, which is neither OWNER/REPOSITORY@COMMIT, with all 40 "
            "digits of the commit, nor a folder. A branch or a tag can move, so only a commit is taken."
        )
    return name, place


def kernel_of_hub(name: str, own: ModuleType) -> ModuleType:
    """
    The module of kernels that runs.

    Args:
        name (`str`):
            Name of the kernel, one of `NAMES`.
        own (`ModuleType`):
            This package's module. Its `INTERFACE` names what the code that calls it relies on: values, enumerations,
            named tuples and functions, which have to be the same there.

    Returns:
        `ModuleType`: the module at the same place in the kernel that the environment names, or `own`.

    Raises:
        ValueError: If the environment names something that cannot be a kernel.
    """
    place = named_kernels().get(name)
    if place is None:
        return own
    try:
        found = _loaded(place, own)
    except Exception as error:  # of the network, of the package, or of whatever the kernel's code does
        reason = (str(error).splitlines() or [""])[0]
        logger.warning(f"{name} of {place} is left aside, and {_PACKAGE}'s own runs: {type(error).__name__}: {reason}")
        return own
    different = [one for one in own.INTERFACE if _shape(getattr(found, one, None)) != _shape(getattr(own, one))]
    if different:
        logger.warning(
            f"{name} of {place} is left aside, and {_PACKAGE}'s own runs: it does not fit this version, in "
            f"{', '.join(different)}."
        )
        return own
    logger.info(f"{name} of {place} runs.")
    return found


def _loaded(place: str, own: ModuleType) -> ModuleType:
    """The module at the place of `own` in a kernel. Nothing but the commit named is downloaded."""
    if importlib.util.find_spec("kernels") is None:
        raise ImportError("the package `kernels` is not installed; pip install kernels")
    import kernels

    if repository := _REPOSITORY.fullmatch(place):
        name, commit = repository.groups()
        kernel = kernels.get_kernel(name, revision=commit, trust_remote_code=[name])
    else:
        kernel = kernels.get_local_kernel(Path(place))
    return importlib.import_module(own.__name__.removeprefix(_PACKAGE), kernel.__name__)


def _shape(value: Any) -> Any:
    """What two versions of a thing have to share for one to stand in for the other."""
    if isinstance(value, EnumMeta):
        return [(member.name, member.value) for member in value]  # type: ignore[var-annotated]
    for names in ("_fields", "arg_names"):  # of a named tuple, of a kernel
        if hasattr(value, names):
            return getattr(value, names)
    return list(inspect.signature(value).parameters) if inspect.isfunction(value) else value
