"""TRL's reward script with our optimizers and strict recipes: `python -m trl_ext.scripts.reward --config RECIPE`."""

from .trl_scripts import trl_script


main, make_parser = trl_script("reward", __name__)
