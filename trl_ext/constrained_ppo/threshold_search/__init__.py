"""Nelder-Mead on the thresholds within one run (NM-PPO, https://huggingface.co/papers/2310.04373, section 5.1)."""
