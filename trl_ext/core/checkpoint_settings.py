"""The settings that a checkpoint was written with, and what a run that resumes from it may have otherwise."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .safe_text import known_secrets, redacted
from .status import RunError


Settings = dict[str, Any]
# Fields that say where and how a run reports, not what it computes, and those that may hold secrets
_LEFT_OUT = {
    "output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "overwrite", "full_disk", "save_on_signal",
    "report_to", "project", "trackio_space_id", "disable_tqdm", "log_level", "log_level_replica", "push_to_hub",
    "deepspeed", "fsdp", "fsdp_config", "local_rank", "ddp_timeout", "dashboard", "log_completions",
    "log_on_each_node", "save_on_each_node", "accelerator_config", "debug", "skip_memory_metrics", "model_init_kwargs",
    "use_cpu", "use_mps_device", "no_cuda", "do_train", "do_eval", "do_predict", "eval_on_start",
}  # fmt: skip
_SECRET = ("token", "api_key", "password", "secret")  # endings of names
# The folders of an absolute path that is a whole text, and of one in it that goes on neither an address nor a path
_FOLDERS = re.compile(
    r"""\A~?/(?:[^\n/]+/)+(?=[^\n/]*\Z)|(?<![\w:/.~>-])(?:/|~/|[A-Za-z]:\\)(?:[^/\\\s,;:'"=]+[/\\])+"""
)
# Of the optimizer, which its state in a checkpoint would bring back
OPTIMIZER_OPTIONS = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "mask_learning_rate",
    "mask_weight_decay", "critic_learning_rate", "head_learning_rate",
)  # fmt: skip


def stated_settings(args: Any, more: Mapping[str, Any]) -> Settings:
    """
    Settings as a manifest keeps them.

    Args:
        args (`~transformers.TrainingArguments`):
            Configuration.
        more (`Mapping[str, Any]`):
            Settings that are no fields of it, or stand in the place of a field; `None` leaves the field out.

    Returns:
        `dict[str, Any]`: values of JSON by name, nothing that is or could hold a secret, and nothing of this machine.
    """
    fields = {
        name: value
        for name, value in args.to_dict().items()
        if name not in _LEFT_OUT and not name.startswith(("hub_", "_"))
    }
    for name, value in more.items():
        fields.pop(name, None)
        if value is not None:
            fields[name] = value
    plain = json.loads(json.dumps(_without_secrets(fields), default=str))
    return without_places(plain, known_secrets(getattr(args, "hub_token", None)))


def without_places(value: Any, secrets: Iterable[str] = ()) -> Any:
    """
    A value as others may read it: secrets hidden, and of an absolute path its last name, with four digits that tell
    whether its folder is the same.

    Args:
        value (`Any`):
            Value of JSON.
        secrets (`Iterable[str]`, *optional*, defaults to `()`):
            What must not be shown.

    Returns:
        `Any`: of the same kind; a value that has been through this comes out as it is.
    """
    if isinstance(value, str):
        return _FOLDERS.sub(lambda found: f"<{_digits(found[0])}>/", redacted(value, secrets))
    if isinstance(value, Mapping):
        return {without_places(key, secrets): without_places(one, secrets) for key, one in value.items()}
    return [without_places(one, secrets) for one in value] if isinstance(value, list) else value


def _digits(folders: str) -> str:
    return hashlib.sha256(folders.encode()).hexdigest()[:4]


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = ((str(key), one) for key, one in value.items() if not str(key).lower().endswith(_SECRET))
        return {key: _without_secrets(one) for key, one in kept}
    return [_without_secrets(one) for one in value] if isinstance(value, (list, tuple)) else value


def compare_settings(saved: Settings, own: Settings, fixed: Collection[str], checkpoint: str) -> dict[str, tuple]:
    """
    What a run has otherwise than the checkpoint that it goes on from.

    Args:
        saved (`dict[str, Any]`):
            Settings of the checkpoint.
        own (`dict[str, Any]`):
            Settings of the run. A setting that only one of them has is not compared: versions differ in their fields.
        fixed (`Collection[str]`):
            Names of the settings that must be the same; `"name."` stands for all whose names begin with it.
        checkpoint (`str`):
            Name of the checkpoint, for the error.

    Returns:
        `dict[str, tuple]`: saved and own value of each setting that differs and may.

    Raises:
        RunError: If one that must be the same is not, with both values.
    """
    changes = {name: (saved[name], own[name]) for name in own if name in saved and saved[name] != own[name]}
    refused = [name for name in changes if name in fixed or any(name.startswith(p) for p in fixed if p[-1] == ".")]
    if refused:
        stated = "; ".join(f"`{name}` is {changes[name][1]!r} here and was {changes[name][0]!r}" for name in refused)
        raise RunError(
            f"The checkpoint {checkpoint} cannot be gone on from with these settings: {stated}. Set what the "
            "checkpoint was written with, or train from its weights without `resume_from_checkpoint`."
        )
    return changes


def stated_changes(changes: Mapping[str, tuple]) -> str:
    """The changes in words."""
    return "; ".join(f"`{name}` is {now!r} (was {before!r})" for name, (before, now) in changes.items())
