"""What a stage has left in its folder, for the report: numbers, curves, pictures and examples."""

import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any


# What a reader looks for first, in this order; each is a pattern of a whole key
_KEYS = (
    r"eval_gold", r"eval_rewards/.+/mean", r"eval_kl/per_response", r"eval_accuracy", r"eval_rewards/accuracies",
    r"eval_loss", r"rewards/.+/mean", r"rewards/accuracies", r"accuracy", r"mean_token_accuracy", r"mask/reward/mean",
    r"multiplier/.+", r"kl/per_response", r"loss", r"ep/homeostasis_loss", r"train_loss",
)  # fmt: skip
# When the number under a key was taken, for the heading above it
EVALUATION, STEP, RUN = "Last evaluation", "Last training steps logged", "Mean over all training steps"
MAX_NUMBERS, MAX_CURVES, MAX_PICTURES, MAX_EXAMPLES = 12, 3, 8, 3
MAX_PICTURE_BYTES = 4_000_000


@dataclass
class Findings:
    """
    What a stage has left.

    Args:
        numbers (`list[tuple[str, float]]`):
            What a stage without a log says of itself.
        logged (`dict[str, list[tuple[str, float]]]`):
            Of the log's keys worth a place the last value, by what it is of: an evaluation, some steps, all of them.
        curves (`list[tuple[str, bytes]]`):
            Key of the log and PNG of its course.
        pictures (`list[tuple[str, bytes]]`):
            Title and PNG of each picture in the folder.
        notes (`list[str]`):
            Sentences.
        examples (`list[dict]`):
            Rows of data that the stage has made.
        left_out (`int`):
            Number of pictures that the folder has beyond these.
    """

    numbers: list[tuple[str, float]] = field(default_factory=list)
    logged: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    curves: list[tuple[str, bytes]] = field(default_factory=list)
    pictures: list[tuple[str, bytes]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0


def read_findings(folder: Path) -> Findings:
    """
    Reads what a stage has left.

    Args:
        folder (`Path`):
            Its output folder.

    Returns:
        [`Findings`]
    """
    found = Findings()
    history = log_history(folder)
    names = ordered_keys(history)
    for name in names[:MAX_NUMBERS]:
        found.logged.setdefault(_taken(name), []).append((name, _course(history, name)[-1][1]))
    if "ep/homeostasis_loss" in names:
        losses = [name for name in ("eval_loss", "loss", "train_loss") if name in names]
        found.notes.append(
            f"The homeostasis objective is in {', '.join(losses)}: homeostasis_coef times what is logged as "
            "ep/homeostasis_loss, which falls from the first steps on."
        )
    found.curves = draw_curves(history, names)
    _proxy_points(folder / "proxy_points" / "proxy_points.json", found)
    _pairs(folder, found)
    paths = pictures_of(folder)
    for path in paths[:MAX_PICTURES]:
        found.pictures.append((str(path.relative_to(folder).with_suffix("")), path.read_bytes()))
    found.left_out = max(0, len(paths) - MAX_PICTURES)
    return found


def _taken(name: str) -> str:
    if name == "train_loss":
        return RUN
    return EVALUATION if name.startswith("eval_") else STEP


def log_history(folder: Path) -> list[dict[str, Any]]:
    """The log of a training, of its last checkpoint where it has left none itself; empty where there is none."""
    kept = sorted(folder.glob("checkpoint-*"), key=lambda path: int(re.sub(r"\D", "", path.name) or 0))
    places = [folder, *reversed(kept)]
    log = next((found for place in places if (found := _json(place / "trainer_state.json")) is not None), None)
    history = log.get("log_history", []) if isinstance(log, dict) else []
    return [entry for entry in history if isinstance(entry, dict)]


def ordered_keys(history: Sequence[dict[str, Any]]) -> list[str]:
    """The keys of a log that are worth a place, the first of them first."""
    names = dict.fromkeys(name for entry in history for name in entry)
    return list(dict.fromkeys(name for key in _KEYS for name in names if re.fullmatch(key, name)))


def draw_curves(history: Sequence[dict[str, Any]], names: Iterable[str]) -> list[tuple[str, bytes]]:
    """
    Draws the first keys that were logged at least three times, each by itself.

    Args:
        history (`Sequence[dict]`):
            Entries of the log.
        names (`Iterable[str]`):
            Keys.

    Returns:
        `list[tuple[str, bytes]]`: keys and PNGs.
    """
    from ..core.figures import line_style, new_axes

    courses = ((name, _course(history, name)) for name in names)
    drawn: list[tuple[str, bytes]] = []
    for name, course in islice(((name, course) for name, course in courses if len(course) > 2), MAX_CURVES):
        figure, (axes,) = new_axes(width=4.2, height=2.8)
        axes.plot(*zip(*course, strict=True), **{**line_style(len(drawn)), "markersize": 4})
        axes.set_xlabel("step")
        axes.set_ylabel(name if len(name) < 36 else f"{name[:34]}…", parse_math=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        drawn.append((name, buffer.getvalue()))
    return drawn


def pictures_of(folder: Path) -> list[Path]:
    """Pictures that are there to be looked at: of those of single steps the last one."""
    own = [*sorted(folder.glob("*.png")), *sorted((folder / "proxy_points").glob("*.png"))]
    steps = sorted(
        (folder / "token_masks").glob("step_*.png"), key=lambda path: int(re.sub(r"\D", "", path.stem) or 0)
    )
    return [path for path in [*own, *steps[-1:]] if path.stat().st_size <= MAX_PICTURE_BYTES]


def _course(history: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [
        (entry.get("step", 0), float(entry[name])) for entry in history
        if isinstance(entry.get(name), (int, float))
    ] or [(0, float("nan"))]  # fmt: skip


def _proxy_points(path: Path, found: Findings) -> None:
    summary = _json(path)
    if not isinstance(summary, dict):
        return
    best = summary.get("joint")
    for index, name in enumerate(summary["rewards"]):
        point = best["point"][index] if best else summary["independent"][name]["point"][0]
        found.numbers.append((f"proxy point of {name}", point))
    found.numbers.append(("runs", summary["num_runs"]))
    found.notes += summary["notes"]


def _pairs(folder: Path, found: Findings) -> None:
    summary = _json(folder / "summary.json")
    if isinstance(summary, dict):
        found.numbers += [(name, value) for name, value in summary.items() if isinstance(value, (int, float))]
    path = folder / "pairs.jsonl"
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            found.examples = [json.loads(line) for line in islice(file, MAX_EXAMPLES)]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
