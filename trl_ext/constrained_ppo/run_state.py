"""Old place of [`critic_from_pretrained`], which stands in published model cards."""

import warnings
from typing import Any

from . import checkpoint


def __getattr__(name: str) -> Any:
    if name != "critic_from_pretrained":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "`trl_ext.constrained_ppo.run_state` is going away: import `critic_from_pretrained` from `trl_ext`.",
        DeprecationWarning,
        stacklevel=2,
    )
    return checkpoint.critic_from_pretrained
