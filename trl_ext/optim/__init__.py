"""AdamP and SGDP (https://huggingface.co/papers/2006.08217)."""

from .adamp import AdamP
from .known_views import scale_invariant_weights
from .sgdp import SGDP


__all__ = ["SGDP", "AdamP", "scale_invariant_weights"]
