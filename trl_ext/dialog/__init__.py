"""Deprecated: what is left of the dialogue experiment in the package, for one release."""
