"""Constrained PPO (https://huggingface.co/papers/2310.04373): the mathematics; the trainer is not here yet."""
