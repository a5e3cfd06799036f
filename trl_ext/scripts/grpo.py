"""TRL's GRPO script with our optimizers and strict recipes: `python -m trl_ext.scripts.grpo --config RECIPE`."""

from .trl_scripts import trl_script


main, make_parser = trl_script("grpo", __name__)
