"""`trl-ext pipeline`: stages, each a recipe of a command, run one after the other; what is done is not done again."""
