"""Deprecated: `python -m recipes.experiments.constrained_ppo_dailydialog.prepare`."""

from ..core.moved import moved


moved(__name__, "constrained_ppo_dailydialog.prepare")
