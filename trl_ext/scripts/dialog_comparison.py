"""Deprecated: `python -m recipes.experiments.constrained_ppo_dailydialog.run`."""

from ..core.moved import moved


moved(__name__, "constrained_ppo_dailydialog.run", recipe="recipes/constrained_ppo/dailydialog_comparison.yaml")
