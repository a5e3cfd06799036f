r"""
Bytes on each GPU, and bytes that it sends in a step, under each way to divide a model over N GPUs.

For P parameters of which T are trained, with weights of b bytes and an optimizer with m moments:

                weights    gradients   optimizer           besides
    DDP         b P        b T         m b T               b T, the buckets of gradients; 2 T, autocast's copies
    ZeRO-1      2 P        2 T         (4 + 4 m + 4) T/N   the bucket: 2 min(T, 5e8)
    ZeRO-2      2 P        2 T/N       (4 + 4 m + 4) T/N   the bucket
    ZeRO-3      2 P/N      2 T/N       (4 + 4 m + 4) T/N   the bucket; 2 min(P, 1e9), weights that are gathered
    FSDP2       4 P/N      4 T/N       4 m T/N             2 (P outside the layers and two layers), gathered

DeepSpeed holds 16-bit weights and, of the trained ones, float32 copies and float32 gradients in the optimizer. Its
buckets and the weights that ZeRO-3 keeps gathered are DeepSpeed's defaults. A reference model is divided as the policy
is under ZeRO-3 and FSDP2, and whole elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass


ENGINES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
_SHARDS_WEIGHTS = ("ZeRO-3", "FSDP2")
# DeepSpeed's `reduce_bucket_size` and `stage3_max_live_parameters`
_BUCKET = 500_000_000
_LIVE = 1_000_000_000


@dataclass(frozen=True)
class Part:
    """
    A model on the GPU.

    Attributes:
        name (`str`): What it is.
        parameters (`int`): Parameters.
        trained (`int`): Those that are trained.
        weight_bytes (`float`): Bytes of one weight as it is loaded; 0.5 in 4 bits.
        outside (`int`): Parameters outside the layers, such as embeddings.
        layer (`int`): Parameters of one layer.
        gathers (`int`): How often a sharding engine gathers its weights in a micro-step: 2 with a backward pass.
        shardable (`bool`): Whether an engine divides it; small companions are.
    """

    name: str
    parameters: int
    trained: int = 0
    weight_bytes: float = 4
    outside: int = 0
    layer: int = 0
    gathers: int = 1
    shardable: bool = True


@dataclass(frozen=True)
class Work:
    """
    What a step computes on each GPU.

    Attributes:
        activations (`int`): Bytes kept for the backward pass, and of what is computed at once.
        method (`int`): Bytes that the method keeps besides, such as the states that masks read.
        generation (`int`): Bytes of the cache of keys and values while completions are generated.
        moments (`int`): Values that the optimizer keeps for each trained weight.
        moment_bytes (`int` or `None`): Bytes of each, or `None` for those of the weight.
        accumulation (`int`): Micro-steps of a step.
        mixed (`bool`): Whether products are computed in 16 bits.
    """

    activations: int
    method: int = 0
    generation: int = 0
    moments: int = 2
    moment_bytes: int | None = None
    accumulation: int = 1
    mixed: bool = True


@dataclass(frozen=True)
class Need:
    """
    What one engine needs on each GPU, in bytes.

    Attributes:
        engine (`str`): Name of the engine.
        weights (`int`): Weights.
        gradients (`int`): Gradients.
        optimizer (`int`): Moments, and DeepSpeed's float32 copies.
        buffers (`int`): Buckets, gathered weights and copies in another precision.
        work (`int`): Activations and what the method keeps, or the cache of a generation, whichever is more.
        sent (`int`): Bytes that a GPU sends in an optimizer step.
    """

    engine: str
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    work: int
    sent: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.work


def need(engine: str, parts: Sequence[Part], work: Work, num_gpus: int) -> Need:
    """
    The table of this module, summed over the models of a run.

    Args:
        engine (`str`):
            One of `ENGINES`.
        parts (`Sequence[Part]`):
            The models.
        work (`Work`):
            What a step computes.
        num_gpus (`int`):
            Number of GPUs, at least 1.

    Returns:
        `Need`

    Raises:
        ValueError: If the engine is unknown or there is no GPU.
    """
    if engine not in ENGINES or num_gpus < 1:
        raise ValueError(f"`engine` must be one of {', '.join(ENGINES)} and `num_gpus` at least 1.")
    deepspeed = engine.startswith("ZeRO")
    weights = gradients = optimizer = buffers = gathered_at_once = sent = 0
    for part in parts:
        size: float = 2 if deepspeed and work.mixed else 4 if engine == "FSDP2" and part.trained else part.weight_bytes
        compute = 2 if work.mixed else size
        over = num_gpus if engine in _SHARDS_WEIGHTS and part.shardable else 1
        weights += int(part.parameters * size / over)
        gradients += int(part.trained * size / (num_gpus if engine in ("ZeRO-2", *_SHARDS_WEIGHTS) else 1))
        moment = work.moment_bytes or (4 if deepspeed else size)
        kept = work.moments * moment + (8 if deepspeed and work.mixed else 0)
        optimizer += int(part.trained * kept / (1 if engine == "DDP" else num_gpus))
        if engine == "DDP":
            buffers += int(part.trained * size) if num_gpus > 1 else 0
            buffers += 2 * part.trained if work.mixed and size == 4 else 0
        elif engine == "ZeRO-3" and part.shardable:
            gathered_at_once += int(min(part.parameters, _LIVE) * compute)
        elif engine == "FSDP2" and part.shardable:
            gathered_at_once += int((part.outside + 2 * part.layer) * compute)
        sent += _sent(engine, part, work, num_gpus, size, compute)
    if deepspeed:
        buffers += min(sum(part.trained for part in parts), _BUCKET) * (2 if work.mixed else 4)
    buffers += gathered_at_once if num_gpus > 1 else 0
    # A generation keeps the weights and the optimizer; gradients and activations come after it
    busy = max(work.activations + work.method, work.generation - gradients)
    return Need(engine, weights, gradients, optimizer, buffers, busy, sent)


def _sent(engine: str, part: Part, work: Work, num_gpus: int, size: float, compute: float) -> int:
    """Bytes that a GPU sends for one model in an optimizer step, with rings: (N - 1)/N of what goes round."""
    reduced = part.trained * (compute if engine in _SHARDS_WEIGHTS else size)
    if engine == "DDP":
        rounds = 2 * reduced
    elif engine == "ZeRO-1":
        rounds = reduced + part.trained * compute
    elif engine == "ZeRO-2":
        rounds = work.accumulation * reduced + part.trained * compute
    else:
        gathers = part.gathers * part.parameters * compute if part.shardable else 0
        rounds = work.accumulation * (gathers + reduced)
    return int(rounds * (num_gpus - 1) / num_gpus)
