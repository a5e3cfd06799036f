"""axolotl's plugin for every method here; `docs/axolotl.md` says what was run, against which version.

axolotl loads `TRLExtPlugin` by its name and takes `TRLExtArgs` into its schema; `trainers` has the trainers that the
plugin asks axolotl for. Nothing of axolotl is changed: only what its plugin interface and its keys offer is used.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .arguments import TRLExtArgs as TRLExtArgs
    from .plugin import TRLExtPlugin as TRLExtPlugin

_EXPORTS = {"TRLExtArgs": "arguments", "TRLExtPlugin": "plugin"}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {sorted(_EXPORTS)}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
