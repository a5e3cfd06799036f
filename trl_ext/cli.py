"""The command `trl-ext`: recipes checked first, then launched with accelerate."""

import importlib
import os
import sys
import textwrap
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from . import __version__
from .core.quiet import quiet_environment
from .launcher import PATIENCE, accelerate_configs, run_launcher


TRL_COMMANDS = ("sft", "dpo", "grpo", "kto", "reward", "rloo")
# Command: script module with `make_parser`
TRAINING_COMMANDS = {
    "sparse-po": "trl_ext.scripts.sparse_po",
    "constrained-ppo": "trl_ext.scripts.constrained_ppo",
    "constrained-grpo": "trl_ext.scripts.constrained_grpo",
    **{name: f"trl_ext.scripts.{name}" for name in TRL_COMMANDS},
    "equilibrium-reward": "trl_ext.scripts.equilibrium_reward",
    "equilibrium-classifier": "trl_ext.scripts.equilibrium_classifier",
}
_LAUNCH_OPTIONS = ("accelerate_config", "num_processes")
USAGE = """usage: trl-ext COMMAND [options]    trl-ext COMMAND --help    trl-ext --version

Training, each by a recipe:
  trl-ext COMMAND --config RECIPE [--accelerate_config NAME] [--num_processes N]
                  [--KEY VALUE ...] [--print_config | --dry_run] [--verbose]
  sparse-po               a policy, with SparsePO
  constrained-ppo         a policy, with PPO, plain or constrained
  constrained-grpo        a policy, with GRPO, plain or constrained
  equilibrium-reward      a reward model with an equilibrium-propagation head
  equilibrium-classifier  a text classifier with such a head
  sft, dpo, grpo, kto, reward, rloo
                          TRL's own scripts; `optim: adamp` is valid, and sgdp

Around it:
  recipes       list the package's recipes, or those below a FOLDER;
                recipes show NAME, recipes copy NAME [FOLDER]
  plan          what a recipe needs of each GPU under DDP, ZeRO and FSDP2:
                trl-ext plan --config RECIPE [--gpus N] [--memory GIB]
  pipeline      several of these commands, each on what the ones before have made:
                trl-ext pipeline --config PIPELINE [--dry_run]
  sample-pairs  the best and the worst of a policy's completions, as pairs:
                trl-ext sample-pairs --model FOLDER --dataset_name NAME
                --reward NAME
  sweep         plain PPO at several weights of its rewards, and proxy points:
                trl-ext sweep --config RECIPE [--reward_weights 1,0 0,1]
  proxy-points  values of rewards beyond which a gold metric falls, from logs:
                trl-ext proxy-points --runs FOLDER ...
  data          data of the Hub in the form that a recipe wants:
                trl-ext data hh-pairs --output FILE
  demo          the methods on the playground, compared
  doctor        versions, devices, compilers, memory and caches
  completion    what completes all this in bash: eval "$(trl-ext completion)"

A RECIPE is a YAML file, or the name of one of the package.
--print_config prints its settings, --dry_run what it would do; neither trains.
--verbose prints all that is logged, and what other libraries warn of.
--accelerate_config takes a file, or one of {configs}.
A recipe outside the working folder that names code to import needs
--trust_recipe_code."""
_RECIPES_USAGE = """usage: trl-ext recipes [FOLDER]
       trl-ext recipes show NAME
       trl-ext recipes copy NAME [FOLDER]

Lists the package's recipes, or the YAML files below a folder, with command,
hardware and purpose; shows one of the package, or copies it, with the
DeepSpeed config that it names, to be changed."""
_COMPLETION_USAGE = """usage: eval "$(trl-ext completion)"

Prints what completes commands, options, their choices and packaged recipes in
bash, and in zsh after `autoload bashcompinit && bashcompinit`."""


def main(arguments: list[str] | None = None) -> int:
    """
    Runs `trl-ext`.

    Args:
        arguments (`list[str]`, *optional*):
            Arguments. Defaults to the process's own.

    Returns:
        `int`: exit status; a launched command's own.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    if not arguments or arguments[0] in ("--help", "-h"):
        usage = USAGE.format(configs=", ".join(accelerate_configs())).splitlines()
        filled = [textwrap.fill(line, 80, break_on_hyphens=False) if len(line) > 80 else line for line in usage]
        Console(markup=False, highlight=False, soft_wrap=True).print("\n".join(filled))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        Console(highlight=False).print(__version__)
        return 0
    command, *rest = arguments
    commands: dict[str, Callable[[list[str]], int]] = {
        "completion": lambda words: _completion(words, [*commands]),
        "data": _data,
        "demo": _demo,
        "doctor": _doctor,
        "pipeline": _pipeline,
        "plan": _plan,
        "proxy-points": _proxy_points,
        "recipes": _recipes,
        "sample-pairs": _sample_pairs,
        "sweep": _sweep,
    }
    commands |= {name: partial(_train, name) for name in TRAINING_COMMANDS}
    if command not in commands:
        close = get_close_matches(command.replace("_", "-"), commands, n=1)
        hint = f"Did you mean `{close[0]}`? " if close else ""
        listed = textwrap.fill(f"{hint}The commands are {', '.join(sorted(commands))}.", 80, break_on_hyphens=False)
        errors.print(f"trl-ext: unknown command {command!r}.\n{listed}")
        return 2
    try:
        return commands[command](rest)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        errors.print(f"trl-ext {command}: {error}")
        return 2


def accelerate_config_path(name: str) -> str:
    """
    The file of an accelerate config given by path or by name.

    Raises:
        ValueError: If there is neither such a file nor such a name.
    """
    if Path(name).is_file():
        return name
    if name in accelerate_configs():
        return str(files("trl_ext") / "accelerate_configs" / f"{name}.yaml")
    raise ValueError(
        f"`--accelerate_config {name}` is neither a file nor one of {', '.join(accelerate_configs())}. Give one of "
        "them."
    )


def launch_command(module: str, arguments: list[str]) -> list[str]:
    """
    The `accelerate launch` command line of a training script, its recipe not yet checked.

    Raises:
        ValueError: If the accelerate config is unknown, or does not run the number of processes asked for.
    """
    from .scripts.recipe.overrides import take_option

    script_arguments = list(arguments)
    name, num_processes = (take_option(script_arguments, f"--{option}") for option in _LAUNCH_OPTIONS)
    config = accelerate_config_path(name or "single_process")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--quiet"]
    if num_processes is not None:
        if not num_processes.isdigit() or int(num_processes) < 1:
            raise ValueError(f"`--num_processes {num_processes}` must be a whole number of at least 1.")
        # accelerate would run one process and say nothing; YAML reads an unquoted NO as false
        if int(num_processes) > 1 and _yaml(config).get("distributed_type") in ("NO", False):
            others = ", ".join(other for other in accelerate_configs() if other != "single_process")
            raise ValueError(
                f"`--num_processes {num_processes}` cannot be had with {config}, which runs one process. Give "
                f"`--accelerate_config` a file for several processes, or one of {others}."
            )
        command += ["--num_processes", num_processes]
    return [*command, "-m", module, *script_arguments]


def _yaml(path: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"The accelerate config {path} is not valid YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"The accelerate config {path} must be a mapping, got {type(found).__name__}.")
    return found


def _train(name: str, arguments: list[str]) -> int:
    from .scripts.recipe.named_code import announcement
    from .scripts.recipe.required import require_files, require_packages
    from .scripts.recipe.stand_ins import light_parser
    from .scripts.recipe.strict_parser import take_flag

    arguments = list(arguments)
    shows = {
        flag: take_flag(arguments, f"--{flag}") | take_flag(arguments, f"--{flag.replace('_', '-')}")
        for flag in ("print_config", "dry_run")
    }
    module = TRAINING_COMMANDS[name]
    command = launch_command(module, arguments)
    script_arguments = command[command.index(module) + 1 :]
    parser = light_parser(module, "trl-ext") or importlib.import_module(module).make_parser(prog="trl-ext")
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if "--help" in script_arguments or "-h" in script_arguments:
        from .scripts.recipe.usage import usage_text

        console.print(usage_text(parser, name, accelerate_configs()))
        return 0
    # Refuses a wrong recipe here, before any process is launched, and without touching this process's environment
    environment = parser.check(script_arguments, _LAUNCH_OPTIONS)
    if shows["print_config"]:
        from .scripts.recipe.preview import config_text

        console.print(config_text(parser))
        return 0
    _require_parts(parser.parsed, module)
    if shows["dry_run"]:
        from .scripts.recipe.preview import dry_run_text

        console.print(dry_run_text(parser, module, *_processes(command)))
        try:
            require_files(parser.parsed)
        except ValueError as error:
            console.print(f"{'missing':<10} {error}")
        return 0
    require_packages(parser.parsed)
    require_files(parser.parsed)
    if parser.named_code:
        Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(announcement(parser.named_code))
    saves = getattr(parser.parsed, "save_on_signal", False)  # which TRL's own configurations have not
    quiet = {} if parser.verbose else quiet_environment(os.environ)
    return run_launcher(command, {**os.environ, **quiet, **environment}, None if saves else PATIENCE)


def _require_parts(parsed: Any, module: str) -> None:
    """Refuses here what the script would, since a launcher's own words would come after the script's."""
    from .scripts.recipe.required import require_model_and_data, require_rewards

    require_model_and_data(parsed, parsed, parsed)
    if module.rpartition(".")[2].startswith("constrained"):
        require_rewards(parsed.reward_funcs)


def _processes(command: list[str]) -> tuple[str, int]:
    """The accelerate config of a launcher's command line, and the number of processes that it starts."""
    config = command[command.index("--config_file") + 1]
    if "--num_processes" in command:
        return config, int(command[command.index("--num_processes") + 1])
    return config, int(_yaml(config).get("num_processes") or 1)


def _demo(arguments: list[str]) -> int:
    from .demo import main

    return main(arguments)


def _completion(arguments: list[str], commands: list[str]) -> int:
    from .completion import bash_script

    text = f"{_COMPLETION_USAGE}\n" if arguments else bash_script(commands, TRAINING_COMMANDS)
    Console(markup=False, highlight=False, soft_wrap=True).print(text, end="")
    return 0


def _data(arguments: list[str]) -> int:
    from .scripts.hub_data import main

    return main(arguments)


def _doctor(arguments: list[str]) -> int:
    from .doctor import main

    return main(arguments)


def _plan(arguments: list[str]) -> int:
    from .plan.command import main

    try:
        return main(arguments, TRAINING_COMMANDS)
    except OSError as error:
        raise ValueError(error) from error


def _pipeline(arguments: list[str]) -> int:
    from .pipeline.command import main as pipeline

    return pipeline(arguments, TRAINING_COMMANDS, main)


def _proxy_points(arguments: list[str]) -> int:
    from .scripts.proxy_points import main as proxy_points

    try:
        return proxy_points(arguments, prog="trl-ext proxy-points")
    except ImportError as error:
        raise ValueError(error) from error


def _sample_pairs(arguments: list[str]) -> int:
    from .scripts.sample_pairs import main as sample_pairs

    return sample_pairs(arguments, prog="trl-ext sample-pairs")


def _sweep(arguments: list[str]) -> int:
    from .scripts.sweep import main as sweep

    return sweep(arguments, prog="trl-ext sweep")


def _recipes(arguments: list[str]) -> int:
    from .scripts.recipe.packaged import copy_recipe, header_of, packaged_recipes, read_packaged

    console = Console(markup=False, highlight=False, soft_wrap=True)
    if "--help" in arguments or "-h" in arguments:
        console.print(_RECIPES_USAGE)
        return 0
    if arguments[:1] == ["copy"]:
        if len(arguments) not in (2, 3):
            raise ValueError("`recipes copy` takes the name of a recipe and, if you like, a folder.")
        for path in copy_recipe(arguments[1], Path(*arguments[2:])):
            console.print(f"Written: {path}")
        return 0
    if arguments[:1] == ["show"]:
        if len(arguments) != 2:
            raise ValueError("`recipes show` takes the name of a recipe.")
        console.print(read_packaged(arguments[1]), end="")
        return 0
    folder = Path(*arguments)
    if not folder.is_dir():
        raise ValueError(
            f"{' '.join(arguments)} is neither a folder with recipes nor `show NAME` or `copy NAME [FOLDER]`."
        )
    listed = {str(path): path for path in sorted(folder.rglob("*.yaml"))} if arguments else packaged_recipes()
    for name, path in listed.items():
        header = header_of(path)
        console.print(name)
        for line in (header.title, ", ".join(filter(None, (header.command, header.hardware)))):
            console.print(textwrap.fill(line, 80, initial_indent="    ", subsequent_indent="    "))
    return 0


if __name__ == "__main__":
    sys.exit(main())
