"""`trl-ext completion`: commands, options, their choices and packaged recipes, completed by bash."""

from collections.abc import Iterable, Mapping

from .launcher import accelerate_configs
from .scripts.recipe.packaged import packaged_recipes
from .scripts.recipe.stand_ins import light_parser


_LAUNCHING = ("--config", "--accelerate_config", "--num_processes", "--print_config", "--dry_run", "--verbose",
              "--help")  # fmt: skip
_HEAD = """_trl_ext() {
  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} words=
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="%(commands)s"
  elif [ "$previous" = --config ] || [ "${COMP_WORDS[1]}" = recipes ]; then
    words="%(recipes)s"
  elif [ "$previous" = --accelerate_config ]; then
    words="%(configs)s"
  else
    case ${COMP_WORDS[1]} in
"""
_TAIL = """    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _trl_ext trl-ext
"""


def bash_script(commands: Iterable[str], training: Mapping[str, str]) -> str:
    """
    The completion as a script of bash.

    Args:
        commands (`Iterable[str]`):
            Every command of `trl-ext`.
        training (`Mapping[str, str]`):
            Script module of each training command.

    Returns:
        `str`
    """
    recipes = ["copy", "show", *packaged_recipes()]
    names = {"commands": sorted(commands), "recipes": recipes, "configs": accelerate_configs()}
    return (
        _HEAD % {key: " ".join(words) for key, words in names.items()}
        + "".join(_case(command, module) for command, module in training.items())
        + _TAIL
    )


def _case(command: str, module: str) -> str:
    """The options of a training command, and after an option with choices those."""
    parser = light_parser(module)
    if parser is None:
        return ""
    options, choices = list(_LAUNCHING), []
    for action in parser._actions:
        if not action.option_strings[0].startswith("--no_") and action.dest != "help":
            options.append(action.option_strings[0])
        if action.choices:
            values = " ".join(str(getattr(choice, "value", choice)) for choice in action.choices)
            choices.append(f'        {action.option_strings[0]}) words="{values}" ;;')
    lines = [f"    {command})", "      case $previous in", *choices, f'        *) words="{" ".join(options)}" ;;']
    return "\n".join([*lines, "      esac ;;", ""])
