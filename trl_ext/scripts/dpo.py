"""TRL's DPO script with our optimizers and strict recipes: `python -m trl_ext.scripts.dpo --config RECIPE`."""

from .trl_scripts import trl_script


main, make_parser = trl_script("dpo", __name__)
