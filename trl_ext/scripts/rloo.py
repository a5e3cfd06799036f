"""TRL's RLOO script with our optimizers and strict recipes: `python -m trl_ext.scripts.rloo --config RECIPE`."""

from .trl_scripts import trl_script


main, make_parser = trl_script("rloo", __name__)
