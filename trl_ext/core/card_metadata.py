"""The metadata of a model card that the Hub reads: data sets, licence and results, each only where it is known."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SOURCE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)[@/]")
# Key of the log: kind and name of the metric on the Hub
_METRICS = {
    "eval_accuracy": ("accuracy", "Accuracy"),
    "eval_rewards/accuracies": ("accuracy", "Accuracy of preferences"),
    "eval_reward": ("reward", "Mean reward"),
    "eval_loss": ("loss", "Loss"),
}


def hub_datasets(dataset: Any, named: Iterable[str | None] = ()) -> list[str]:
    """
    Ids of the data sets of the Hub that a trainer was given.

    Args:
        dataset (`Any`):
            The training data, which says where it was downloaded from.
        named (`Iterable[str]`, *optional*):
            Names that a recipe has for it; those of other places are left out.

    Returns:
        `list[str]`
    """
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = [match[1] for match in map(_SOURCE.match, map(str, sources)) if match]
    found += [name for name in named if name and _HUB_ID.fullmatch(name) and not Path(name).exists()]
    return list(dict.fromkeys(found))


def license_of(base_model: str | None) -> dict[str, str]:
    """
    The licence of a base model as its own card states it, in its folder or in the Hub's cache.

    Args:
        base_model (`str` or `None`):
            Id or folder.

    Returns:
        `dict[str, str]`: `license` and, where it has them, `license_name` and `license_link`; empty where the card is
        not on this machine or states none.
    """
    if not base_model:
        return {}
    card = Path(base_model) / "README.md"
    if not card.is_file():
        cached = try_to_load_from_cache(base_model, "README.md") if _HUB_ID.fullmatch(base_model) else None
        if not isinstance(cached, str):
            return {}
        card = Path(cached)
    try:
        stated = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except ValueError:  # no card, or not one that can be read
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: stated[key] for key in keys if isinstance(stated.get(key), str)}


def results_of(log_history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The metrics of the last evaluation that a `model-index` names, by the log's keys."""
    measured: dict[str, Any] = {}
    for entry in log_history:
        measured = measured if _METRICS.keys().isdisjoint(entry) else entry
    numbers = {key: measured[key] for key in _METRICS if isinstance(measured.get(key), (int, float))}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}


def completed_metadata(
    metadata: dict[str, Any],
    datasets: Sequence[str] = (),
    base_model: str | None = None,
    log_history: Sequence[dict[str, Any]] = (),
) -> ModelCardData:
    """
    A card's metadata with what is known beside it; what it has already stays.

    Args:
        metadata (`dict[str, Any]`):
            Metadata of the card that the parent's trainer wrote.
        datasets (`Sequence[str]`, *optional*):
            Ids of data sets on the Hub.
        base_model (`str`, *optional*):
            Id or folder of the base model.
        log_history (`Sequence[dict]`, *optional*):
            The trainer's log.

    Returns:
        `~huggingface_hub.ModelCardData`
    """
    stated = {key: value for key, value in metadata.items() if key != "licence" and value not in (None, [], "")}
    if datasets:
        stated.setdefault("datasets", list(datasets))
    if "license" not in stated:
        stated |= license_of(base_model)
    results = results_of(log_history)
    if results and "model-index" not in stated and stated.get("model_name"):
        task = "text-classification" if stated.get("pipeline_tag") == "text-classification" else "text-generation"
        source = datasets[0] if datasets else "local"
        stated["eval_results"] = [
            EvalResult(
                task_type=task, dataset_type=source, dataset_name=f"{source}, evaluation split",
                metric_type=_METRICS[key][0], metric_name=_METRICS[key][1], metric_value=round(value, 6),
            )
            for key, value in results.items()
        ]  # fmt: skip
    return ModelCardData(**stated)
