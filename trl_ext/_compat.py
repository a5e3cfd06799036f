"""The only module that touches private names of TRL, transformers, accelerate, DeepSpeed and PEFT.

Every name gathered here is watched by `tests/contract/` on each TRL version the package claims to support.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx, use_adapter


__all__ = [
    "FusedCausalLMOutput",
    "SyncRefModelCallback",
    "disable_gradient_checkpointing",
    "gathered_state_dict",
    "keep_from_vllm",
    "maybe_gather_lm_head_ctx",
    "observe_attention",
    "open_rollout",
    "restore_rollout",
    "use_adapter",
]


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


def gathered_state_dict(module: Any) -> dict[str, Any]:
    """
    Whole float32 copies of a module's parameters and saved buffers on the CPU, gathered under ZeRO-3 and FSDP2, where
    all processes must call it.
    """
    from torch.distributed.tensor import DTensor

    parameters = dict(module.named_parameters())
    with maybe_gather_lm_head_ctx(*parameters.values()):
        whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}
        whole |= {name: buffer for name, buffer in module.state_dict().items() if name not in parameters}
        return {name: p.detach().float().cpu().clone() for name, p in whole.items()}
