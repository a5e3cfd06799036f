"""What the plugin adds to axolotl's schema."""

from typing import Any

from pydantic import BaseModel


class TRLExtArgs(BaseModel):
    """
    The key `trl_ext` of an axolotl configuration.

    Attributes:
        trl_ext (`dict[str, Any]`, *optional*):
            `method`, one of `sparse_po`, `constrained_ppo`, `constrained_grpo` and `ep_reward`, and beside it any
            fields of that method's configuration. Checked by [`TRLExtPlugin`].
    """

    trl_ext: dict[str, Any] | None = None
