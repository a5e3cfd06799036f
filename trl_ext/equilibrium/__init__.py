"""Equilibrium propagation: a head whose gradient comes from nudged relaxations."""
