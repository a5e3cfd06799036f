"""Deprecated: `python -m recipes.experiments.adamp_scale_invariance.run`."""

from ..core.moved import moved


moved(__name__, "adamp_scale_invariance.run", recipe="recipes/optim/scale_invariance.yaml")
