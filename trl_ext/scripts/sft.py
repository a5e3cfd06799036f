"""
Supervised fine-tuning: TRL's own script with this package's optimizers and strict recipes.

python -m trl_ext.scripts.sft --config RECIPE
"""

from functools import partial

from . import trl_scripts


main = partial(trl_scripts.main, "sft")
make_parser = partial(trl_scripts.make_parser, "sft")

if __name__ == "__main__":
    trl_scripts.run("sft")
