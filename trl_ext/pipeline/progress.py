"""What is done of a pipeline: a marker for each stage, with what it was made from."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.status import RunError
from .definition import STAGES_FOLDER, Pipeline, Stage


_CODE_KEYS = ("reward_funcs", "gold_reward", "reward")


@dataclass
class Marker:
    """
    What a stage was made from, and how far it has come.

    Args:
        made_from (`dict[str, str]`):
            Hash of each key of its recipe, of each option and of each input; [`made_from`].
        run (`str`):
            Name of this run, which stages that read it are made from.
        done (`bool`, *optional*, defaults to `False`):
            Whether it has come to its end.
        seconds (`float`, *optional*, defaults to `0.0`):
            How long it has taken, interrupted attempts included.
        command (`list[str]`, *optional*):
            Command line of the last attempt.
    """

    made_from: dict[str, str]
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    done: bool = False
    seconds: float = 0.0
    command: list[str] = field(default_factory=list)


class Progress:
    """
    The markers of a pipeline, in its folder `stages`.

    Args:
        pipeline ([`Pipeline`]):
            Pipeline.
    """

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self.folder = pipeline.output_dir / STAGES_FOLDER

    def marker(self, name: str) -> Marker | None:
        """The marker of a stage; `None` where there is none, or one that cannot be read."""
        try:
            return Marker(**json.loads((self.folder / f"{name}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, stage: Stage, marker: Marker) -> None:
        """Writes a marker in one move."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{stage.name}.json"
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        partial.write_text(json.dumps(asdict(marker), indent=1))
        os.replace(partial, path)

    def recipe_path(self, stage: Stage) -> Path:
        """Where the recipe of a stage is written to, as it is run."""
        return self.folder / f"{stage.name}.yaml"

    def state(self, stage: Stage) -> str:
        """
        How far a stage has come, when all that it reads is done.

        Returns:
            `str`: `"done"`, `"interrupted"`, `"outdated"` where it was made from something else than it would be
            now, `"unknown"` where its folder has something and no marker says what, or `"new"`.
        """
        marker, folder = self.marker(stage.name), self.pipeline.folder(stage)
        if not folder.is_dir() or not any(folder.iterdir()):
            return "new"
        if marker is None:
            return "unknown"
        if marker.made_from != self.made_from(stage):
            return "outdated"
        return "done" if marker.done else "interrupted"

    def made_from(self, stage: Stage) -> dict[str, str]:
        """
        What decides the outcome of a stage: a hash of each key of its recipe, each option, its command and launch, and
        each file and folder that it reads; and the run of each earlier stage.
        """
        pipeline = self.pipeline
        recipe = pipeline.recipe(stage) if pipeline.commands[stage.command].takes_recipe else {}
        recipe.pop("output_dir", None)
        found = {name: _hash(value) for name, value in {**recipe, **stage.options}.items()}
        launch = {name: getattr(stage, name) for name in ("command", "accelerate_config", "num_processes")}
        found |= {name: _hash(value) for name, value in launch.items() if value is not None}
        for name in stage.reads():
            marker = self.marker(name)
            found[f"stage {name}"] = marker.run if marker and marker.done else ""
        own = pipeline.output_dir.resolve()
        for text in _texts({**recipe, **stage.options}):
            path = _existing(text)
            if path is not None and not path.resolve().is_relative_to(own):
                found[f"content of {text}"] = content_hash(path)
        for name in _code(recipe | stage.options):
            found[f"code of {name}"] = content_hash(Path(*name.split(".")).with_suffix(".py"))
        return found

    def changed(self, stage: Stage) -> list[str]:
        """Names of what an outdated stage would be made from otherwise now."""
        marker, now = self.marker(stage.name), self.made_from(stage)
        before = marker.made_from if marker else {}
        return [name for name in {**before, **now} if before.get(name) != now.get(name)]

    def begin(self, stage: Stage, overwrite: bool) -> Marker:
        """
        The marker of a stage that is about to run, written as unfinished; an outdated folder is deleted.

        Args:
            stage ([`Stage`]):
                Stage, whose state is not `"done"`.
            overwrite (`bool`):
                Whether an outdated folder may be deleted.

        Returns:
            [`Marker`]

        Raises:
            RunError: If the folder is outdated, and may not.
        """
        state, folder = self.state(stage), self.pipeline.folder(stage)
        if state in ("outdated", "unknown"):
            if not overwrite:
                why = "no marker says from which recipe"
                if state == "outdated":
                    why = f"it was made from another recipe or other inputs ({', '.join(self.changed(stage))})"
                raise RunError(
                    f"The stage `{stage.name}` has a folder, {folder}, and {why}. Delete it and what was made from it "
                    "with `--overwrite`, or choose another `output_dir`."
                )
            shutil.rmtree(folder)
        marker = self.marker(stage.name) if state == "interrupted" else None
        marker = marker or Marker(self.made_from(stage))
        self.write(stage, marker)
        return marker


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _texts(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) and value else []


def _existing(text: str) -> Path | None:
    try:
        path = Path(text)
        # A folder that the working folder lies in is none that a recipe reads
        return path if path.exists() and not Path.cwd().is_relative_to(path.resolve()) else None
    except (OSError, ValueError):  # too long for a name, or with a NUL
        return None


def _code(settings: Mapping[str, Any]) -> list[str]:
    """Modules of the working folder that reward functions stand in."""
    names = [text for key in _CODE_KEYS for text in _texts(settings.get(key)) if "." in text]
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return [name for name in modules if Path(*name.split(".")).with_suffix(".py").is_file()]


def content_hash(path: Path) -> str:
    """
    A hash of what a file or folder holds: of a file its bytes, of a folder names, sizes and times of change.

    Args:
        path (`Path`):
            File or folder.

    Returns:
        `str`
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    found = []
    for inner in sorted(path.rglob("*")):
        if inner.is_file():
            stat = inner.stat()
            found.append((str(inner.relative_to(path)), stat.st_size, stat.st_mtime_ns))
    return _hash(found)
