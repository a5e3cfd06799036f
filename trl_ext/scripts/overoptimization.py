"""Deprecated: `python -m recipes.experiments.constrained_ppo_playground.run`."""

from ..core.moved import moved


moved(__name__, "constrained_ppo_playground.run", recipe="recipes/constrained_ppo/overoptimization.yaml")
