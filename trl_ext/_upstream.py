"""The only module that touches private names of TRL, transformers, accelerate, DeepSpeed, FSDP1 and PEFT.

Every name gathered here is watched by `tests/contract/` on each TRL version the package claims to support.
"""

import gc
import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import Trainer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames


if TYPE_CHECKING:
    from trl.models.utils import disable_gradient_checkpointing as disable_gradient_checkpointing
    from trl.trainer.callbacks import SyncRefModelCallback as SyncRefModelCallback
    from trl.trainer.utils import FusedCausalLMOutput as FusedCausalLMOutput
    from trl.trainer.utils import is_async_callable as is_async_callable
    from trl.trainer.utils import maybe_gather_lm_head_ctx as maybe_gather_lm_head_ctx
    from trl.trainer.utils import use_adapter as use_adapter

__all__ = [
    "DEFAULT_CALLBACKS",
    "FusedCausalLMOutput",
    "SyncRefModelCallback",
    "add_optimizer_name",
    "attention_masks_changed_by",
    "completion_columns_named",
    "copy_parameters",
    "cpu_without_number",
    "decay_parameter_names",
    "disable_gradient_checkpointing",
    "fsdp1_layout",
    "gathered_state_dict",
    "is_async_callable",
    "is_partitioned",
    "keep_from_vllm",
    "maybe_gather_lm_head_ctx",
    "observe_attention",
    "open_rollout",
    "optimizer_names",
    "progress_shown_by",
    "reference_built_by",
    "remove_from_auto_classes",
    "remove_optimizer_name",
    "restore_rollout",
    "set_exchange_timeout",
    "use_adapter",
    "zero3_sub_group",
    "zero_process_group",
]

# Whose fused head SparsePO and the critic take part in
OLDEST_TRL = "1.15"

# Read on first use: optimizers and heads run with a TRL that has not all of them, or without TRL
_OF_TRL = {
    "FusedCausalLMOutput": "trl.trainer.utils",
    "SyncRefModelCallback": "trl.trainer.callbacks",
    "disable_gradient_checkpointing": "trl.models.utils",
    "is_async_callable": "trl.trainer.utils",
    "maybe_gather_lm_head_ctx": "trl.trainer.utils",
    "use_adapter": "trl.trainer.utils",
}


def __getattr__(name: str) -> Any:
    if name not in _OF_TRL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_trl()
    return getattr(importlib.import_module(_OF_TRL[name]), name)


def require_trl() -> None:
    """
    Raises an `ImportError` that names both versions where the installed TRL is older than `SparsePOTrainer`,
    `ConstrainedPPOTrainer` and what belongs to them can extend.
    """
    from importlib.metadata import version

    from packaging.version import Version

    if Version(version("trl")) < Version(OLDEST_TRL):
        raise ImportError(
            f"SparsePOTrainer and ConstrainedPPOTrainer extend TRL {OLDEST_TRL} or newer, and trl=={version('trl')} "
            f'is installed: `pip install "trl>={OLDEST_TRL}"`. Optimizers and equilibrium heads run with it as it is.'
        )


@contextmanager
def observe_attention(callback: Callable[..., None]) -> Iterator[None]:
    """
    Calls `callback(module, query, key, value)` each time a transformers attention block calls its attention function,
    whatever the kernel, until the context ends.
    """
    get_interface = ALL_ATTENTION_FUNCTIONS.get_interface

    def observed_get_interface(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        attention_function = get_interface(*args, **kwargs)

        def observed_attention(module: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
            callback(module, query, key, value)
            return attention_function(module, query, key, value, *rest, **options)

        return observed_attention

    ALL_ATTENTION_FUNCTIONS.get_interface = observed_get_interface
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface


@contextmanager
def attention_masks_changed_by(implementation: str, change: Callable[..., Any]) -> Iterator[None]:
    """
    Until the context ends, transformers makes the masks of the attention `implementation` from `change(mask_function)`
    where the model asks for `mask_function`, a function of row, head, query and key. They are made in full, and not
    left to a kernel that is causal by itself.
    """
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    before = dict(masks._local_mapping)
    make_mask = masks.get(implementation)

    def make_changed_mask(*args: Any, mask_function: Callable[..., Any], **kwargs: Any) -> Any:
        assert make_mask is not None
        return make_mask(*args, mask_function=change(mask_function), **{**kwargs, "allow_is_causal_skip": False})

    if make_mask is not None:
        masks[implementation] = make_changed_mask
    try:
        yield
    finally:
        masks._local_mapping = before


def keep_from_vllm(vllm_generation: Any, part: str) -> None:
    """Leaves the parameters whose names have `part` out of what is synchronised to vLLM."""
    every_parameter = vllm_generation._iter_named_params

    def kept_parameters() -> Iterator[tuple[str, Any]]:
        return ((name, parameter) for name, parameter in every_parameter() if part not in name)

    vllm_generation._iter_named_params = kept_parameters


def open_rollout(trainer: Any) -> tuple[int, list[dict[str, Any]] | None]:
    """
    Where a `GRPOTrainer` stands: its number of training steps, micro-batches counted, and the batches of the rollout
    on which updates are still to come, or `None` where the next step generates.
    """
    generate_every = trainer.args.steps_per_generation * trainer.num_iterations
    return trainer._step, trainer._buffered_inputs if trainer._step % generate_every else None


def restore_rollout(trainer: Any, step: int, batches: list[dict[str, Any]] | None) -> None:
    """Sets what [`open_rollout`] gave."""
    trainer._step, trainer._buffered_inputs = step, batches


@contextmanager
def reference_built_by(build: Callable[..., Any], loads_policy: bool) -> Iterator[None]:
    """
    Lets `GRPOTrainer.__init__` take its reference model from `build(load, name, **kwargs)` instead of `load(name,
    **kwargs)`. With `loads_policy` its first load is the policy's, as for a policy that is given by name.
    """
    from trl.trainer import grpo_trainer

    load, to_pass = grpo_trainer.create_model_from_path, int(loads_policy)

    def load_or_build(name: str, **kwargs: Any) -> Any:
        nonlocal to_pass
        to_pass -= 1
        return load(name, **kwargs) if to_pass >= 0 else build(load, name, **kwargs)

    grpo_trainer.create_model_from_path = load_or_build
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load


@contextmanager
def completion_columns_named(shown: Callable[[str], str]) -> Iterator[None]:
    """Until the context ends, `GRPOTrainer.log` prints columns of rewards and of `log_extra` as `shown(name)`."""
    from trl.trainer import grpo_trainer

    print_table = grpo_trainer.print_prompt_completions_sample

    def print_shown(prompts: Any, completions: Any, rewards: Any, *rest: Any, extra: Any = None) -> None:
        named = {shown(name): values for name, values in rewards.items()}
        extra = {shown(name): values for name, values in (extra or {}).items()}
        print_table(prompts, completions, named, *rest, extra=extra)

    grpo_trainer.print_prompt_completions_sample = print_shown
    try:
        yield
    finally:
        grpo_trainer.print_prompt_completions_sample = print_table


@contextmanager
def progress_shown_by(callback: type) -> Iterator[None]:
    """Gives trainers made until the context ends this callback, in the place of their bar and of their printed log."""
    from transformers import trainer

    before = trainer.DEFAULT_PROGRESS_CALLBACK, trainer.PrinterCallback
    trainer.DEFAULT_PROGRESS_CALLBACK = trainer.PrinterCallback = callback
    try:
        yield
    finally:
        trainer.DEFAULT_PROGRESS_CALLBACK, trainer.PrinterCallback = before


@contextmanager
def cpu_without_number(args: Any) -> Iterator[None]:
    """
    Calls the CPU of training arguments "cpu" until the context ends: in several processes accelerate calls it "cpu:0",
    and `torch.load` takes that for no place, to which transformers 5.5 loads the state of an optimizer.
    """
    device = args.device
    args._setup_devices = torch.device("cpu") if device.type == "cpu" else device
    try:
        yield
    finally:
        args._setup_devices = device


def is_partitioned(model: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds a model's parameters in pieces."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def copy_parameters(source: Any, target: Any) -> None:
    """Copies parameters of a model that [`is_partitioned`] into another of its shape; all processes must call it."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    for parameter, copied in zip(source.parameters(), target.parameters(), strict=True):
        with GatheredParameters([parameter, copied], modifier_rank=0):
            copied.data.copy_(parameter.data)


def gathered_state_dict(module: Any) -> dict[str, Any]:
    """
    Whole float32 copies of a module's parameters and saved buffers on the CPU, gathered under ZeRO-3 and FSDP2, where
    all processes must call it.
    """
    from torch.distributed.tensor import DTensor
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    parameters = dict(module.named_parameters())
    with maybe_gather_lm_head_ctx(*parameters.values()):
        whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}
        whole |= {name: buffer for name, buffer in module.state_dict().items() if name not in parameters}
        return {name: p.detach().float().cpu().clone() for name, p in whole.items()}


def optimizer_names() -> set[str]:
    """Values of `optim` that transformers accepts."""
    return set(OptimizerNames._value2member_map_)


def add_optimizer_name(name: str, handler: Callable[[Any], tuple[Any, dict[str, Any]]]) -> None:
    """Makes `name` a member of transformers' closed enum of optimizers; a trainer builds it by `handler`."""
    member = str.__new__(OptimizerNames, name)
    member._name_, member._value_ = name.upper(), name
    type.__setattr__(OptimizerNames, member._name_, member)
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[name] = member
    _OPTIMIZER_HANDLERS[member] = handler


def remove_optimizer_name(name: str) -> None:
    """Undoes [`add_optimizer_name`]."""
    member = OptimizerNames._value2member_map_.pop(name)
    OptimizerNames._member_names_.remove(member._name_)
    del OptimizerNames._member_map_[member._name_]
    type.__delattr__(OptimizerNames, member._name_)
    del _OPTIMIZER_HANDLERS[member]


def remove_from_auto_classes(config_class: Any, auto_class: Any) -> None:
    """Undoes `AutoConfig.register` and `auto_class.register` of a configuration that transformers itself has not."""
    auto_class._model_mapping._extra_content.pop(config_class, None)
    CONFIG_MAPPING._extra_content.pop(config_class.model_type, None)


def decay_parameter_names(model: Any) -> list[str]:
    """Names of the parameters that [`~transformers.Trainer`] decays: no biases, no norms."""
    return Trainer.get_decay_parameter_names(None, model)


def set_exchange_timeout(seconds: float) -> None:
    """
    Lets exchanges over gloo fail after a time. On CPUs transformers leaves `ddp_timeout` out, and torch waits for half
    an hour; NCCL has had the time since the group was made.

    Args:
        seconds (`float`):
            The time.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def zero_process_group(param: Any) -> Any:
    """Processes that DeepSpeed's ZeRO-1, ZeRO-2 or BF16_Optimizer cut a parameter's buffer over, or `None`."""
    return getattr(param, "_dp_group", None)


def zero3_sub_group(flat_param: Any, param: Any) -> list[Any] | None:
    """
    The parameters whose pieces a flat tensor of DeepSpeed's ZeRO-3 is made of, in order; `None` where `param` is not
    one of ZeRO-3's.
    """
    wrapper = getattr(param, "_z3_optimizer", None)
    if wrapper is None:
        return None
    for flat, members in zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True):
        if flat is flat_param:
            return list(members)
    return None


class Fsdp1Layout(NamedTuple):
    """
    Where FSDP1 lays the weights of a flat parameter.

    Attributes:
        weights (`list[tuple[tuple[int, ...], int]]`):
            Shape of each weight and its first element in the whole flat parameter.
        piece_size (`int`):
            Elements of the flat parameter that each process holds.
        rank (`int`):
            Which piece is here.
        process_group (`torch.distributed.ProcessGroup`):
            The processes that hold the pieces.
        place (`int`, *optional*):
            Which of the weights the parameter asked for is a view of; `None` for the flat parameter itself.
    """

    weights: list[tuple[tuple[int, ...], int]]
    piece_size: int
    rank: int
    process_group: Any
    place: int | None


def fsdp1_layout(param: Any) -> Fsdp1Layout | None:
    """The layout of FSDP1's flat parameter that `param` is, or is a view of; `None` where it is neither."""
    from torch.distributed.fsdp._flat_param import FlatParameter, FlatParamHandle

    if not getattr(param, "_fsdp_flattened", False) and type(param) is not FlatParameter:
        return None
    # Parameters don't know their handle
    for handle in (found for found in gc.get_objects() if type(found) is FlatParamHandle):
        flat = handle.flat_param
        own = [index for index, view in enumerate(flat._params or ()) if view is param]
        if flat is not param and not own:
            continue
        ends = itertools.accumulate(flat._numels_with_padding, initial=0)
        starts = [start for start, padding in zip(ends, flat._is_padding_mask, strict=False) if not padding]
        sharded = handle.uses_sharded_strategy
        return Fsdp1Layout(
            weights=[(tuple(shape), start) for shape, start in zip(flat._shapes, starts, strict=True)],
            piece_size=flat._sharded_size.numel() if sharded else sum(flat._numels_with_padding),
            rank=handle.rank if sharded else 0,
            process_group=handle.process_group,
            place=None if flat is param else own[0],
        )
    return None
