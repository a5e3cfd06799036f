"""`trl-ext plan`: memory and communication of a recipe on paper, before anything is loaded."""
