"""
KTO: TRL's own script with this package's optimizers and strict recipes.

python -m trl_ext.scripts.kto --config RECIPE
"""

from functools import partial

from . import trl_scripts


main = partial(trl_scripts.main, "kto")
make_parser = partial(trl_scripts.make_parser, "kto")

if __name__ == "__main__":
    trl_scripts.run("kto")
