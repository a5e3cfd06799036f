"""TRL's KTO script with our optimizers and strict recipes: `python -m trl_ext.scripts.kto --config RECIPE`."""

from .trl_scripts import trl_script


main, make_parser = trl_script("kto", __name__)
