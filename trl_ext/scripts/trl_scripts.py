"""TRL's own training scripts with this package's optimizers and strict recipes."""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..core.checks import check_fields


if TYPE_CHECKING:
    from .recipe.strict_parser import StrictParser


# Class of `trl` that each script trains with
_TRAINERS = {
    "sft": "SFTTrainer", "dpo": "DPOTrainer", "grpo": "GRPOTrainer", "kto": "KTOTrainer", "reward": "RewardTrainer",
    "rloo": "RLOOTrainer",
}  # fmt: skip


@dataclass
class OptimizerScriptArguments:
    """
    Arguments of the scripts beyond TRL's.

    Args:
        log_optimizer_report (`bool`, *optional*, defaults to `False`):
            Whether to log what AdamP's or SGDP's projection does ([`OptimizerReportCallback`]).
    """

    log_optimizer_report: bool = field(
        default=False, metadata={"help": "Log what the projection of AdamP or SGDP does, and write it to a file."}
    )

    def __post_init__(self) -> None:
        check_fields(self, {})


def trl_script(name: str, module_name: str) -> tuple[Callable[..., None], "Callable[..., StrictParser]"]:
    """
    What each of the modules named as TRL's scripts consists of; `accelerate launch -m` needs a module for each.

    Args:
        name (`str`):
            Name of TRL's script.
        module_name (`str`):
            The module's `__name__`; as the process's own command the script runs.

    Returns:
        `tuple[Callable, Callable]`: `main` and `make_parser`.
    """
    if module_name == "__main__":
        from .recipe.strict_parser import run_strictly

        run_strictly(partial(make_parser, name), partial(main, name))
    return partial(main, name), partial(make_parser, name)


def _of_trl(name: str) -> ModuleType:
    return importlib.import_module(f"trl.scripts.{name}")


@contextmanager
def _whole_checkpoints(name: str, run_args: Any, report: Any = None) -> Iterator[None]:
    """Lets TRL's script, which takes its trainer from `trl`, find it with whole checkpoints and our model card."""
    # The callback `report` learns of the trainer
    import trl

    from ..core.checkpointing import WholeCheckpointsMixin
    from ..core.model_card import MethodCardMixin
    from ..core.run_arguments import RunArguments

    trainer = _TRAINERS[name]
    plain = getattr(trl, trainer)

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        if report is not None:
            report.trainer = self
        return super(whole, self).train(*args, **kwargs)

    stated = {
        "run_arguments": run_args or RunArguments(),
        "_method_section": lambda self, model_id: "",
        "train": train,
    }
    # Under TRL's own name, which goes into cards and manifests
    whole: Any = type(trainer, (WholeCheckpointsMixin, MethodCardMixin, plain), stated)
    setattr(trl, trainer, whole)
    try:
        yield
    finally:
        setattr(trl, trainer, plain)


@contextmanager
def _playground_known(name: str) -> Iterator[None]:
    """Lets TRL's script, which takes `load_dataset` from `datasets`, find the playground under its name."""
    import datasets

    from .recipe.loading import PLAYGROUND

    plain = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        return _playground(name) if path == PLAYGROUND else plain(path, *args, **kwargs)

    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = plain


def _playground(name: str) -> Any:
    """The playground's pairs in the form that a TRL script takes: SFT the better completion, KTO one at a time."""
    from trl import unpair_preference_dataset

    from .. import playground

    pairs = playground.load_playground_dataset()
    if name == "sft":
        return pairs.rename_column("chosen", "completion").remove_columns("rejected")
    return unpair_preference_dataset(pairs) if name == "kto" else pairs


def make_parser(name: str, prog: str | None = None) -> "StrictParser":
    """The strict parser of a TRL script's arguments, with our optimizers among the choices of `optim`."""
    from ..core.run_arguments import RunArguments
    from ..optim import register
    from .recipe.strict_parser import StrictParser

    register()
    types = (*_of_trl(name).make_parser().dataclass_types, OptimizerScriptArguments, RunArguments)
    return StrictParser(types, prog=prog)


def main(
    name: str,
    script_args: Any,
    training_args: Any,
    model_args: Any,
    dataset_args: Any,
    optimizer_args: Any,
    run_args: Any = None,
) -> None:
    """Runs a TRL script on parsed arguments, with checkpoints and resumption as in our own scripts."""
    from ..optim.callbacks import OptimizerReportCallback, default_callback
    from ..optim.names import check_optim_args
    from .recipe.loading import last_checkpoint, left_behind, one_split, require_model_and_data, resolve_model

    check_optim_args(training_args)
    if training_args.hub_token is not None:  # TRL's configurations would write it into `training_args.bin`
        os.environ["HF_TOKEN"], training_args.hub_token = training_args.hub_token, None
    require_model_and_data(model_args, script_args, dataset_args)
    model_args.model_name_or_path = resolve_model(model_args.model_name_or_path)
    training_args.resume_from_checkpoint = last_checkpoint(training_args)
    with ExitStack() as stack:
        report = OptimizerReportCallback() if optimizer_args.log_optimizer_report else None
        stack.enter_context(_whole_checkpoints(name, run_args, report))
        stack.enter_context(_playground_known(name))
        stack.enter_context(one_split())
        if report is not None:
            stack.enter_context(default_callback(report))
        _of_trl(name).main(script_args, training_args, model_args, dataset_args)
    if training_args.process_index == 0:
        Console(markup=False, highlight=False, soft_wrap=True).print(left_behind(training_args.output_dir))
