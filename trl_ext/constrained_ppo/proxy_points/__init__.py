"""Proxy points: where a gold metric is highest over rewards (https://huggingface.co/papers/2310.04373, section 3)."""
