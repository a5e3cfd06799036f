"""Deprecated: rewards of the dialogue experiment, now `recipes.experiments.constrained_ppo_dailydialog.rewards`."""

from ..core.moved import moved


moved(__name__, "constrained_ppo_dailydialog.rewards")
