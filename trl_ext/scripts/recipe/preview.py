"""`--print_config` and `--dry_run`: what a command line comes to, without loading or importing what it names."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import yaml

from ...core.checkpoint_settings import without_places
from ...core.safe_text import known_secrets, shown_folder
from .usage import field_groups


# Of what a step's batch consists, for each script
_UNITS = {
    "sft": "examples", "kto": "examples", "equilibrium_classifier": "examples", "grpo": "completions",
    "rloo": "completions", "constrained_ppo": "completions", "constrained_grpo": "completions",
}  # fmt: skip


def config_text(parser: Any) -> str:
    """
    Every setting of a checked command line as a recipe: what is given, then what is default.

    Args:
        parser ([`StrictParser`]):
            Parser that has checked the command line.

    Returns:
        `str`: YAML; `hub_token` is not shown.
    """
    settings = {name: _plain(value) for name, value in vars(parser.parsed).items() if name != "hub_token"}
    given = {place: [name for name in parser.given if parser.given[name] == place] for place in parser.given.values()}
    blocks = [(f"Given: {place}", names) for place, names in given.items()]
    blocks += [
        (f"Default: {title}", [name for name in names if name not in parser.given])
        for title, names in field_groups(parser).items()
    ]
    texts = []
    for title, names in blocks:
        block = {name: settings[name] for name in names if name in settings}
        if block:
            texts.append(f"# {title}\n{yaml.safe_dump(block, sort_keys=False, width=100, allow_unicode=True)}")
    return "\n".join(texts).rstrip()


def given_text(parser: Any) -> str:
    """
    The settings that a checked command line gives, for the eyes of others.

    Args:
        parser ([`StrictParser`]):
            Parser that has checked it.

    Returns:
        `str`: YAML in the order in which they are given; without secrets, and without folders outside the working one.
    """
    settings = {name: _plain(getattr(parser.parsed, name)) for name in parser.given if name != "hub_token"}
    shown = without_places(_shown(settings), known_secrets(getattr(parser.parsed, "hub_token", None)))
    return yaml.safe_dump(shown, sort_keys=False, width=100, allow_unicode=True).rstrip()


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return shown_folder(value) if Path(value).is_absolute() else value
    if isinstance(value, dict):
        return {key: _shown(one) for key, one in value.items()}
    return [_shown(one) for one in value] if isinstance(value, list) else value


def dry_run_text(parser: Any, module: str, accelerate_config: str, processes: int) -> str:
    """
    What a checked command line would load and train.

    Args:
        parser ([`StrictParser`]):
            Parser that has checked it.
        module (`str`):
            The script's module.
        accelerate_config (`str`):
            File of the accelerate config.
        processes (`int`):
            Number of processes.

    Returns:
        `str`
    """
    args, script = parser.parsed, module.rpartition(".")[2]
    rows = {
        "model": _model(args),
        "tokenizer": getattr(args, "tokenizer_name_or_path", None) or "the model's own",
        "data": _data(args),
        "rewards": ", ".join(map(str, _as_list(getattr(args, "reward_funcs", None)))),
        "limits": "; ".join(map(_constraint, getattr(args, "constraints", None) or ())),
        "critic": getattr(args, "critic_model_name_or_path", None),
        "processes": f"{processes}, {Path(accelerate_config).stem}{_deepspeed(args)}",
        "batch": _batch(args, script, processes),
        "steps": _steps(args, processes),
        "precision": "fp16" if args.fp16 else "float32" if args.bf16 is False else "bf16",
        "optimizer": f"{_plain(args.optim)}, learning rate {args.learning_rate:g}, {_plain(args.lr_scheduler_type)}",
        "evaluates": _when(args.eval_strategy, args.eval_steps or args.logging_steps) or "never",
        "saves": f"{args.output_dir}, {_when(args.save_strategy, args.save_steps) or 'at the end alone'}",
        "settings": f"{len(parser.given)} given, the others default: --print_config shows them",
    }
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items() if value)


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a data set of `datasets`
        return {name: _plain(one) for name, one in vars(value).items() if one is not None}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _model(args: Any) -> str:
    parts = [args.model_name_or_path]
    parts += [f"weights in {args.dtype}"] if args.dtype not in (None, "auto") else []
    parts += [f"LoRA of rank {args.lora_r}"] if args.use_peft else []
    parts += ["in 4 bits" if args.load_in_4bit else "in 8 bits"] if args.load_in_4bit or args.load_in_8bit else []
    return ", ".join(parts)


def _data(args: Any) -> str:
    named = [_plain(entry) for entry in args.datasets or ()]
    names = [", ".join(map(str, _as_list(each.get("data_files")))) or each["path"] for each in named]
    data = " + ".join(names) or args.dataset_name
    evaluated = _plain(args.eval_strategy) != "no"
    held_out = f"{args.test_split_size:g} of it" if args.test_split_size else f"split {args.dataset_test_split}"
    return f"{data}, split {args.dataset_train_split}" + (f"; evaluated on {held_out}" if evaluated else "")


def _deepspeed(args: Any) -> str:
    return f", DeepSpeed of {args.deepspeed}" if args.deepspeed else ""


def _per_step(args: Any, processes: int) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes


def _batch(args: Any, script: str, processes: int) -> str:
    size, unit = _per_step(args, processes), _UNITS.get(script, "pairs")
    text = f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} accumulated"
    text += f" x {processes} process{'es' if processes > 1 else ''} = {size:,} {unit} in a step"
    groups = getattr(args, "num_generations", None) if unit == "completions" else None
    return text + (f", of {size / groups:g} prompts" if groups and groups > 1 else "")


def _steps(args: Any, processes: int) -> str:
    if args.max_steps > 0:
        return f"{args.max_steps:,}"
    rows = _rows(args)
    if rows is None:
        return f"{args.num_train_epochs:g} epochs of the training rows"
    steps = math.ceil(math.ceil(rows / _per_step(args, processes)) * args.num_train_epochs)
    return f"{steps:,}, {args.num_train_epochs:g} epochs of {rows:,} rows"


def _rows(args: Any) -> int | None:
    """Rows of the training split, where the data is one file of JSON lines on this machine."""
    files = _as_list(args.datasets[0].get("data_files")) if len(args.datasets or ()) == 1 else []
    if len(files) != 1 or not str(files[0]).endswith(".jsonl") or not Path(files[0]).is_file():
        return None
    with Path(files[0]).open("rb") as file:
        rows = sum(1 for line in file if line.strip())
    if not args.test_split_size:
        return rows
    return (
        rows - math.ceil(rows * args.test_split_size) if args.test_split_size < 1 else rows - int(args.test_split_size)
    )


def _constraint(constraint: dict[str, Any]) -> str:
    stated = {key: constraint[key] for key in ("threshold", "quantile", "relative_gain") if key in constraint}
    bound = ", ".join(f"{value}" if key == "threshold" else f"{key} {value}" for key, value in stated.items())
    return " ".join(filter(None, (str(constraint.get("reward")), constraint.get("kind"), bound)))


def _when(strategy: Any, steps: Any) -> str:
    strategy = _plain(strategy)
    return {"no": "", "steps": f"every {steps:g} steps", "epoch": "after every epoch"}.get(strategy, strategy)
