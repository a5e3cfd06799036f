"""Deprecated: `python -m recipes.experiments.adamp_language_models.run`."""

from ..core.moved import moved


moved(__name__, "adamp_language_models.run", recipe="recipes/optim/imdb_language_models.yaml")
