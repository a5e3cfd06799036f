"""The command `trl-ext plan`: what a recipe needs on each GPU under each engine, and which of them have it."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .memory import ENGINES, Need, need


GIB = 2**30
# Of a GPU's memory: the context of CUDA and NCCL, and what the allocator cannot use
CONTEXT = 1.5 * GIB
USABLE = 0.95


def main(arguments: list[str], modules: Mapping[str, str]) -> int:
    """
    Runs `trl-ext plan`.

    Args:
        arguments (`list[str]`):
            Arguments.
        modules (`Mapping[str, str]`):
            Script module of each training command.

    Returns:
        `int`: exit status.

    Raises:
        ValueError: If the recipe is refused, names no command, or its model's configuration cannot be read.
    """
    from ..scripts.recipe.stand_ins import light_parser

    options, rest = make_parser(list(modules)).parse_known_args(arguments)
    if options.gpus < 1 or not options.memory > 0 or options.prompt_length < 1:
        raise ValueError("`--gpus` and `--prompt_length` must be at least 1, and `--memory` above 0.")
    command = options.command or _command_of(options.config, modules)
    parser: Any = light_parser(modules[command], "trl-ext plan")
    if parser is None:
        raise ValueError("`plan` cannot read the fields of the installed versions; `trl-ext doctor` says which.")
    parser.check(["--config", options.config, *rest])
    if not parser.parsed.model_name_or_path:
        raise ValueError("`model_name_or_path` is missing. Name a model, or a folder with its `config.json`.")
    from .of_recipe import plan_of  # which imports torch

    plan = plan_of(parser.parsed, modules[command].rpartition(".")[2], _config, options.prompt_length)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(_heading(parser.parsed, plan))
    needs = [need(engine, plan.parts, plan.work, options.gpus) for engine in ENGINES]
    Console(markup=False, highlight=False).print(table_of(needs, options.gpus, options.memory))
    for line in [*_fewest(plan, options), *plan.notes]:
        console.print(line)
    return 0


def make_parser(commands: list[str]) -> argparse.ArgumentParser:
    """The parser of the command's own options; all others are the recipe's."""
    parser = argparse.ArgumentParser("trl-ext plan", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--config", required=True, help="recipe: a file, or the name of a packaged one")
    add("--gpus", type=int, default=1, help="number of GPUs")
    add("--memory", type=float, default=80.0, help="memory of one GPU in GiB")
    listed = f"training command, of {', '.join(commands)}; by default the one in the recipe's head"
    add("--command", choices=commands, default=None, metavar="COMMAND", help=listed)
    add("--prompt_length", type=int, default=512, help="tokens of a prompt, where completions are generated")
    return parser


def _command_of(config: str, modules: Mapping[str, str]) -> str:
    """The training command that the head of a recipe names."""
    from ..scripts.recipe.packaged import closest_packaged, find_packaged, header_of

    path = Path(config) if Path(config).is_file() else find_packaged(config)
    if path is None:
        raise ValueError(
            f"`--config {config}` is not a file.{closest_packaged(config)} `trl-ext recipes` lists the recipes."
        )
    named = header_of(path).command.split()
    if len(named) < 2 or named[1] not in modules:
        raise ValueError(f"{config} does not say in its head which command it is for. Give `--command`.")
    return named[1]


def _config(name: str) -> Any:
    from transformers import AutoConfig

    from ..scripts.recipe.loading import resolve_model

    try:
        return AutoConfig.from_pretrained(resolve_model(name))
    except (OSError, ValueError) as error:
        raise OSError(
            f"The configuration of {name} cannot be read ({str(error).splitlines()[0]}). Give "
            "`--model_name_or_path` a folder with its `config.json`."
        ) from error


def _heading(args: Any, plan: Any) -> str:
    own = [part for part in plan.parts if part.name in ("policy", "adapters")]
    total, trained = (sum(getattr(part, field) for part in own) for field in ("parameters", "trained"))
    others = ", ".join(f"{part.name} {_count(part.parameters)}" for part in plan.parts if part not in own)
    lines = [f"{args.model_name_or_path}: {_count(total)} parameters, {_count(trained)} trained"]
    lines += [f"Beside it: {others}"] if others else []
    kept = (f"activations {plan.work.activations / GIB:.1f}", f"method {plan.work.method / GIB:.1f}")
    generation = [f"cache of a generation {plan.work.generation / GIB:.1f}"] if plan.work.generation else []
    lines.append(
        f"{plan.batch} sequences of {plan.length:,} tokens on each GPU; {', '.join([*kept, *generation])} GiB"
    )
    return "\n".join(lines)


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def fits(total: float, memory: float) -> bool:
    """
    Whether a GPU has what a run needs, beside its context and what its allocator cannot use.

    Args:
        total (`float`):
            Bytes.
        memory (`float`):
            Memory of the GPU in GiB.

    Returns:
        `bool`
    """
    return total + CONTEXT <= USABLE * memory * GIB


def table_of(needs: list[Need], num_gpus: int, memory: float) -> Table:
    """
    What each engine needs.

    Args:
        needs (`list[Need]`):
            Of each engine.
        num_gpus (`int`):
            Number of GPUs.
        memory (`float`):
            Memory of one in GiB.

    Returns:
        `rich.table.Table`
    """
    gpus = "One GPU" if num_gpus == 1 else f"{num_gpus} GPUs"
    title = f"{gpus} of {memory:g} GiB: GiB on each, and sent by each in an optimizer step"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("engine", "weights", "gradients", "optimizer", "buffers", "step", "total", "fits", "sent"):
        table.add_column(column, justify="left" if column == "engine" else "right", no_wrap=True)
    for one in needs:
        parts = (one.weights, one.gradients, one.optimizer, one.buffers, one.work, one.total)
        cells = [f"{part / GIB:.2f}" for part in parts]
        table.add_row(one.engine, *cells, "yes" if fits(one.total, memory) else "no", f"{one.sent / GIB:.2f}")
    return table


def _fewest(plan: Any, options: argparse.Namespace) -> list[str]:
    """The fewest GPUs that do, up to the number given."""
    for number in range(1, options.gpus + 1):
        engines = [e for e in ENGINES if fits(need(e, plan.parts, plan.work, number).total, options.memory)]
        if engines:
            gpus = "One GPU of this size does" if number == 1 else f"{number} GPUs of this size do"
            return [f"{gpus}, with {', '.join(engines)}."]
    return [f"No engine has room on {options.gpus} such GPUs: lower the batch or the length, or use LoRA."]
