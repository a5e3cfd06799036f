"""TRL's SFT script with our optimizers and strict recipes: `python -m trl_ext.scripts.sft --config RECIPE`."""

from .trl_scripts import trl_script


main, make_parser = trl_script("sft", __name__)
