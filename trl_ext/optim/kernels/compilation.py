"""
The library of adamp.c: compiled where there is a C compiler, and kept from process to process. What lies in the cache
folder is loaded only if it is this user's own and the very bytes that were written there.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from pathlib import Path


logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("adamp.c")
# What it is compiled from
SOURCES = [SOURCE, *(Path(__file__).with_name(name) for name in ("lanes.h", "table.h"))]
FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


@functools.cache
def compiled_library(needed: bool = False) -> ctypes.CDLL | None:
    """
    The kernels, built once for each processor, compiler and source in the cache folder (`XDG_CACHE_HOME`, or
    `~/.cache`); `None` where that fails, with a warning if they are `needed`.
    """
    built = _build()
    if isinstance(built, str):
        if needed:
            warnings.warn(f"`fused=True`: {built}; torch's own kernels are used.", stacklevel=2)
        return None
    return built


@functools.cache
def _build() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none; says so once."""
    try:
        library, found = _load_or_compile()
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        reason = f"the kernels were not built ({getattr(error, 'stderr', None) or error})"
        logger.info("AdamP on a CPU: torch's own kernels, since %s.", reason)
        return reason
    logger.info("AdamP on a CPU: compiled kernels, %s.", found)
    return library


def _compiler() -> list[str]:
    """The command of the C compiler, which may be several words (`CC="ccache gcc"`)."""
    command = shlex.split(os.environ.get("CC") or "")
    found = command or [path for path in map(shutil.which, ("cc", "gcc", "clang")) if path][:1]
    if not found:
        raise RuntimeError("no C compiler was found")
    return found


def _load_or_compile() -> tuple[ctypes.CDLL, str]:
    """The library, and where it comes from."""
    compiler = _compiler()
    sources = b"".join(path.read_bytes() for path in SOURCES)
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(sources + " ".join(FLAGS).encode() + version + _machine()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl_ext" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # In a folder that others can write to, a file may be another one by the time that it is loaded
        why_not = None if _is_own(folder) else "is another user's, or others can write to it"
    except OSError as error:
        why_not = f"can't be made ({error.strerror})"
    if why_not is None:
        built = folder / f"adamp_cpu_{key}.so"
        if _is_intact(built):
            return ctypes.CDLL(str(built)), f"from {built}"
        _compile(compiler, built)
        return ctypes.CDLL(str(built)), f"compiled into {built}"
    with tempfile.TemporaryDirectory() as scratch:  # The loaded library stays when its file goes
        built = Path(scratch) / "adamp_cpu.so"
        _compile(compiler, built)
        return ctypes.CDLL(str(built)), f"compiled for this process alone, since {folder} {why_not}"


def _compile(compiler: list[str], built: Path) -> None:
    """Writes the library and its checksum under names that nobody reads, then renames: others may do the same."""
    with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
        made, checksum = Path(scratch) / built.name, Path(scratch) / "checksum"
        subprocess.run(
            [*compiler, *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(made), "-lm"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        made.chmod(0o700)
        checksum.write_text(_digest(made))
        checksum.chmod(0o600)
        os.replace(made, built)
        os.replace(checksum, _checksum_of(built))


def _checksum_of(built: Path) -> Path:
    return built.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_intact(built: Path) -> bool:
    """Whether a file is what was written there, by this user."""
    checksum = _checksum_of(built)
    try:
        return _is_own(built) and _is_own(checksum) and checksum.read_text() == _digest(built)
    except (OSError, ValueError):
        return False


def _is_own(path: Path) -> bool:
    """Whether a file or folder is this user's or root's, and nobody else can write to it."""
    if not hasattr(os, "getuid"):
        return True
    found = path.lstat()
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _machine() -> bytes:
    """What code for this processor may not run on another's: home folders are shared between nodes."""
    info = Path("/proc/cpuinfo")
    lines = info.read_bytes().splitlines() if info.exists() else []
    features = {line for line in lines if line.lower().startswith((b"flags", b"features"))}
    return b"".join(sorted(features)) + f"{platform.machine()} {platform.processor()}".encode()
