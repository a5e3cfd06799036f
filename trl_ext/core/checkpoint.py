"""Checkpoints that are whole or not there. A checkpoint comes to be in four moves, of which only the last shows it:

    <output_dir>/.saving/checkpoint-8     every process writes its files here
    flushed to disk, and hashed           [`publish`]
    trl_ext_checkpoint.json               the manifest: sha256 and size of each file, method, settings, versions
    <output_dir>/checkpoint-8             one rename

[`fault_of`] compares a checkpoint with its manifest before a run goes on from it, and looks at the form of the files
where there is none; [`unsafe_files`] finds pickles that would run code. Everything here works on folders alone: the
trainers' side is `core/checkpointing.py`.
"""

import contextlib
import hashlib
import json
import os
import pickletools
import re
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


MANIFEST_FILE = "trl_ext_checkpoint.json"
FORMAT = 1
# Folders of a run in which nothing is whole yet, or no longer
SAVING, REMOVING = ".saving", ".removing"
# Where a checkpoint of DeepSpeed lies that was cut for this run's number of processes, until it is read
RECUT = ".recut"
STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# Written beside the weights for people, and never read by a resumed run
_NEVER_LOADED = ("training_args.bin",)
_PICKLES = (".pt", ".pth", ".bin")
# What torch itself does not take for harmless and checkpoints of transformers, DeepSpeed and FSDP are made of
_HARMLESS = {
    "numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype",
    "numpy.dtypes.UInt32DType", "_codecs.encode", "collections.OrderedDict", "collections.defaultdict",
    "builtins.dict", "builtins.set", "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath",  # as Python 3.13 calls them
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler", "deepspeed.utils.tensor_fragment.fragment_address",
    "torch.Size", "torch.serialization._get_layout", "torch._utils._rebuild_tensor_v2",
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}  # fmt: skip
_HARMLESS_PARTS = ("torch.distributed.checkpoint.metadata.", "torch.distributed.checkpoint.filesystem.")
# Operations of pickles that hide what is on the stack, or name things by numbers
_OBSCURE = ("POP", "POP_MARK", "DUP", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID")
_WEIGHTS = (
    "model*.safetensors", "adapter_model*.safetensors", "pytorch_model*", "adapter_model*.bin",
    "*/adapter_model.safetensors", "global_step*", "model.safetensors.index.json",
)  # fmt: skip


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of an output folder, by their step, whole or not."""
    if not Path(folder).is_dir():
        return []
    found = {path: _NAME.fullmatch(path.name) for path in Path(folder).iterdir() if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match is not None}
    return sorted(steps, key=lambda path: steps[path])


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint, -1 where the name has none."""
    match = _NAME.fullmatch(checkpoint.name)
    return -1 if match is None else int(match[1])


def publish(partial: Path, final: Path, about: dict[str, Any]) -> dict[str, Any]:
    """
    Makes a folder that is completely written into a checkpoint.

    Args:
        partial (`Path`):
            Folder with all files, on the file system of `final`.
        final (`Path`):
            The checkpoint. One that is there already is replaced.
        about (`dict[str, Any]`):
            What the manifest says beside the files.

    Returns:
        `dict[str, Any]`: the manifest.

    Raises:
        OSError: If something cannot be written; `final` is then as it was.
    """
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    # Disks write, and hashes are made, outside the interpreter's lock
    with ThreadPoolExecutor(min(8, len(paths) or 1)) as pool:
        entries = list(pool.map(_flushed_entry, paths))
    names = [path.relative_to(partial).as_posix() for path in paths]
    manifest = {"format": FORMAT, **about, "files": dict(zip(names, entries, strict=True))}
    manifest["checksum"] = _checksum(manifest)
    with (partial / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for folder in {partial, *(path.parent for path in paths)}:
        _flush_folder(folder)
    aside = None
    if final.exists():
        aside = _aside(final)
        final.rename(aside)
    partial.rename(final)
    _flush_folder(final.parent)
    with contextlib.suppress(OSError):
        partial.parent.rmdir()
    if aside is not None:
        _delete(aside)
    return manifest


def _flushed_entry(path: Path) -> dict[str, Any]:
    with path.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"sha256": digest, "size": file.seek(0, os.SEEK_END)}


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _aside(checkpoint: Path) -> Path:
    """Where a checkpoint goes that is about to be deleted: a name under which nothing resumes from it."""
    folder = checkpoint.parent / REMOVING
    folder.mkdir(exist_ok=True)
    aside = folder / checkpoint.name
    shutil.rmtree(aside, ignore_errors=True)
    return aside


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint: it is gone in one move, and its files after that."""
    aside = _aside(checkpoint)
    checkpoint.rename(aside)
    _delete(aside)


def _delete(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):
        aside.parent.rmdir()


def prune(folder: Path, limit: int | None, kept: Path, best: str | None) -> None:
    """
    Deletes the oldest checkpoints of a run.

    Args:
        folder (`Path`):
            Output folder.
        limit (`int` or `None`):
            How many to keep, `save_total_limit`; `None` and 0 keep all.
        kept (`Path`):
            The one just written, which is never deleted: until here it is the only one that is surely whole.
        best (`str` or `None`):
            The one of the best metric, which is kept too.
    """
    if not limit or limit < 0:
        return
    protected = {kept.resolve()} | ({Path(best).resolve()} if best else set())
    found = checkpoints(folder)
    removable = [path for path in found if path.resolve() not in protected]
    for path in removable[: max(0, len(found) - max(limit, len(protected)))]:
        remove(path)


def clear_remains(folder: Path) -> None:
    """Deletes what an interrupted save, removal or resume has left."""
    for name in (SAVING, REMOVING, RECUT):
        shutil.rmtree(folder / name, ignore_errors=True)


def read_manifest(checkpoint: str | Path) -> dict[str, Any] | None:
    """
    The manifest of a checkpoint, or `None` where it has none.

    Raises:
        ValueError: If it is not as it was written.
    """
    path = Path(checkpoint) / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        whole = manifest["checksum"] == _checksum(manifest)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{MANIFEST_FILE} has changed since it was written")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{MANIFEST_FILE} has the format {manifest['format']}, of another version of trl_ext")
    return manifest


def fault_of(checkpoint: str | Path) -> str | None:
    """
    What is wrong with a checkpoint.

    Args:
        checkpoint (`str` or `Path`):
            Folder of the checkpoint.

    Returns:
        `str` or `None`: the file and what is wrong with it, for a message; `None` for a whole checkpoint. One without
        a manifest is whole where all that can be seen from the form of its files is.
    """
    folder = Path(checkpoint)
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return _fault_of_form(folder)
        for name, entry in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes and was written with {entry['size']}"
        names = list(manifest["files"])
        with ThreadPoolExecutor(min(8, len(names) or 1)) as pool:
            digests = list(pool.map(_digest, [folder / name for name in names]))
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    for name, digest in zip(names, digests, strict=True):
        if digest != manifest["files"][name]["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault_of_form(folder: Path) -> str | None:
    if not (folder / STATE_FILE).is_file():
        return f"{STATE_FILE} is missing"
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return "the weights are missing"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in _PICKLES and path.name not in _NEVER_LOADED:
                with zipfile.ZipFile(path) as archive:
                    broken = archive.testzip()
                if broken is not None:
                    return f"{name} is damaged"
        except (ValueError, SafetensorError, zipfile.BadZipFile, RecursionError):
            return f"{name} is not whole"
    return None


def unsafe_files(checkpoint: str | Path) -> dict[str, list[str]]:
    """
    Files of a checkpoint whose pickles name what no checkpoint is made of, and which may run code when they are read.

    Args:
        checkpoint (`str` or `Path`):
            Folder of the checkpoint.

    Returns:
        `dict[str, list[str]]`: name of each such file, and what it names. Nothing is unpickled.
    """
    found = {}
    folder = Path(checkpoint)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _NEVER_LOADED):
        if path.suffix in _PICKLES:
            names = _globals_of_archive(path)
        elif path.name == ".metadata":
            names = _globals_of_pickle(path.read_bytes())
        else:
            continue
        unknown = [name for name in names if name not in _HARMLESS and not name.startswith(_HARMLESS_PARTS)]
        if unknown:
            found[path.relative_to(folder).as_posix()] = sorted(unknown)
    return found


def load_harmless(path: Path) -> Any:
    """
    Reads a file of `torch.save`, mapped into memory, if it names only what checkpoints are made of.

    Args:
        path (`Path`):
            The file.

    Returns:
        `Any`: what was saved, on the CPU.

    Raises:
        pickle.UnpicklingError: If it names anything else; nothing of that is run.
    """
    named: list[Any] = []
    for name in _HARMLESS:
        module, _, attribute = name.rpartition(".")
        if module in sys.modules:
            named.append(getattr(sys.modules[module], attribute, None))
    with torch.serialization.safe_globals([one for one in named if callable(one)]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _globals_of_archive(path: Path) -> list[str]:
    """What the pickle in a file of `torch.save` names beside what torch takes for harmless."""
    if not zipfile.is_zipfile(path):
        return ["a pickle outside the format of `torch.save`"]
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # Whatever it chokes on is not what was saved
        return [f"{type(error).__name__}: {error}".splitlines()[0]]


def _globals_of_pickle(content: bytes) -> list[str]:
    """What a bare pickle names: the two texts pushed last, as nothing that only takes off the stack is let through."""
    names: list[str] = []
    texts: list[str] = []
    memo: dict[int, str] = {}
    last = ""
    try:
        for operation, argument, _ in pickletools.genops(content):
            kind, pushed = operation.name, ""
            if kind == "GLOBAL":
                names.append(str(argument).replace(" ", "."))
            elif kind == "STACK_GLOBAL":
                names.append(".".join(texts[-2:]))
            elif kind in _OBSCURE:
                names.append(f"the operation {kind}")
            elif "UNICODE" in kind or kind.endswith("STRING"):
                pushed = str(argument)
            elif kind.endswith("GET"):
                pushed = memo.get(int(argument or 0), "")
            elif kind == "MEMOIZE" or kind.endswith("PUT"):
                memo[len(memo) if argument is None else int(argument)] = pushed = last
            if pushed and kind != "MEMOIZE" and not kind.endswith("PUT"):
                texts.append(pushed)
            last = pushed
    except ValueError as error:
        return [str(error)]
    return names
