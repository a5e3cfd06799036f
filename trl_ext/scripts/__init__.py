"""Runnable training scripts, one for each method."""
