"""Deprecated: `python -m recipes.experiments.sparse_po_sentiment.run`."""

from ..core.moved import moved


moved(__name__, "sparse_po_sentiment.run", recipe="recipes/sparse_po/imdb_stories260k.yaml")
