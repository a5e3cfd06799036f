"""Constrained PPO (https://huggingface.co/papers/2310.04373): PPO, plain or with rewards held in their range."""
