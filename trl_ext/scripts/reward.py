"""
Reward modelling: TRL's own script with this package's optimizers and strict recipes.

python -m trl_ext.scripts.reward --config RECIPE
"""

from functools import partial

from . import trl_scripts


main = partial(trl_scripts.main, "reward")
make_parser = partial(trl_scripts.make_parser, "reward")

if __name__ == "__main__":
    trl_scripts.run("reward")
