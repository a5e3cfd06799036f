"""Old names of what left the package for `recipes/experiments/`: they work for one release, from a clone."""

import importlib.util
import runpy
import sys
import warnings
from pathlib import Path


def moved(name: str, new: str, recipe: str | None = None) -> None:
    """
    Lets a module of the package stand for one of `recipes.experiments`: run as a command it runs that, imported it is
    that.

    Args:
        name (`str`):
            The old module's `__name__`.
        new (`str`):
            Where its code is now, below `recipes.experiments`.
        recipe (`str`, *optional*):
            Old path of the experiment's recipe, whose place `config.yaml` has taken.

    Raises:
        ImportError: If there is no clone to find the code in; a command ends with the message.
    """
    clone, module = Path(__file__).resolve().parents[2], f"recipes.experiments.{new}"
    if (clone / "recipes" / "experiments").is_dir() and str(clone) not in sys.path:
        sys.path.append(str(clone))
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        message = (
            f"This has moved to `{module}`, which is in a clone of the repository and not in the installed package."
        )
        message += " Clone it and run from there, or put the clone on PYTHONPATH."
        raise SystemExit(message) if name == "__main__" else ImportError(message)
    warnings.warn(
        f"This has moved to `{module}`; the old name goes with the next release.", DeprecationWarning, stacklevel=2
    )
    if name != "__main__":
        sys.modules[name] = importlib.import_module(module)
        return
    config = str(Path(spec.origin).with_name("config.yaml"))
    sys.argv = [config if recipe and argument.endswith(recipe) else argument for argument in sys.argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
