"""AdamP and SGDP (https://huggingface.co/papers/2006.08217)."""

from .adamp import AdamP
from .sgdp import SGDP


__all__ = ["SGDP", "AdamP"]
