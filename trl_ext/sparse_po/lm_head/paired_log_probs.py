"""Log-probabilities of policy and reference, and the divergence between them, straight from hidden states.

For a token with the models' logits `z` and `z_ref` over the vocabulary, label `y` and `lse = log sum_v exp`:

    log_prob     = z[y] - lse(z)                    ref_log_prob = z_ref[y] - lse(z_ref)
    KL(ref || policy) = sum_v softmax(z_ref)[v] * (z_ref[v] - z[v]) - lse(z_ref) + lse(z)

The logits exist only as tiles of a few tokens by a few vocabulary entries, in the forward and, recomputed, in the
backward pass, which leaves out the tokens that no gradient reaches: those whose weights are zero. [`_PairedLogProbs`]
is what runs; `tests/sparse_po/test_lm_head.py` holds it equal to whole softmaxes. On a GPU with Triton a tile has the
dtype of the projection, as in TRL's own heads, and one kernel reads it in each pass; elsewhere it is float32 or wider.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

from ..._upstream import maybe_gather_lm_head_ctx
from ...core.hub_kernel import kernel_of_hub, named_kernels
from . import triton_kernels


# Tokens by vocabulary entries of one tile of logits. On a CPU, 4 MB in float32, which stays in the caches; on an
# accelerator, 256 MB in bfloat16, enough to fill its matrix units
CPU_TILE = (1024, 1024)
ACCELERATOR_TILE = (4096, 32768)
# What folds tiles and differentiates them; `take_kernel_of_hub` may put another in its place
_kernels = triton_kernels


class HeadStatistics(NamedTuple):
    """
    Statistics of the policy's next-token distribution, without gradient.

    Attributes:
        entropy (`torch.Tensor` of shape `(N,)`, float32): Entropy in nats.
        mean_logits (`torch.Tensor` of shape `(N,)`, float32): Mean logit over the vocabulary.
        is_top1 (`torch.Tensor` of shape `(N,)`, bool): Whether no logit is higher than the label's.
    """

    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor


class LogitTransform(NamedTuple):
    """Logits are `softcap * tanh(scale * x / softcap)` of the projection `x`, or `scale * x` without soft-capping."""

    scale: float
    softcap: float | None

    def apply_(self, projection: torch.Tensor) -> torch.Tensor:
        """Turns projections into logits, in place."""
        if self.softcap is None:
            return projection if self.scale == 1.0 else projection.mul_(self.scale)
        return projection.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)

    def chain_(self, gradient: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """Turns the gradient of logits into that of projections, in place; `logits` is overwritten."""
        if self.softcap is not None and logits is not None:
            gradient.mul_(logits.div_(self.softcap).square_().neg_().add_(1.0))
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """
    How a model turns the projection on its head into logits, read from its text config as TRL's fused head reads it.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Text config of a causal language model.

    Returns:
        `LogitTransform`: the factor on the projection, and the soft-capping bound or `None`.
    """
    scale = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(config, name, None)) is not None
        ),
        None,
    )
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        multiplies = config.model_type == "hyperclovax"
        scale = config.logits_scaling if multiplies else 1 / config.logits_scaling
    return LogitTransform(1.0 if scale is None else float(scale), getattr(config, "final_logit_softcapping", None))


def paired_log_probs(
    policy_hidden: torch.Tensor,
    policy_weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    policy_bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    policy_logit_scale: float = 1.0,
    policy_softcap: float | None = None,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    token_tile: int | None = None,
    vocab_tile: int | None = None,
    return_statistics: bool = False,
) -> Any:
    """
    Log-probabilities of the labels under policy and reference, and the full-vocabulary KL(reference || policy).

    Everything is accumulated in float32 (float64 for float64 inputs); under autocast the projections run on inputs
    rounded to the autocast dtype. On a GPU with Triton a projection is rounded to the dtype of its inputs once, before
    bias and scale, as in TRL's fused heads: in bfloat16 one between 16 and 32 to a multiple of 1/8. Elsewhere it is
    kept in float32. No tensor of shape `(N, V)` is ever held. Gradient flows to the policy's hidden states, weight and
    bias only.

    Args:
        policy_hidden (`torch.Tensor` of shape `(N, H)`):
            Final hidden states of the policy.
        policy_weight (`torch.Tensor` of shape `(V, H)`):
            Weight of the policy's head. ZeRO-3 partitions and FSDP2 `DTensor`s are gathered once.
        ref_hidden (`torch.Tensor` of shape `(N, H')`):
            Final hidden states of the reference model.
        ref_weight (`torch.Tensor` of shape `(V, H')`):
            Weight of its head; may be `policy_weight` itself.
        labels (`torch.Tensor` of shape `(N,)`, int64):
            Token ids in `[0, V)`.
        policy_bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of the policy's head.
        ref_bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of the reference model's head.
        policy_logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the policy's projection (see [`logit_transform`]).
        policy_softcap (`float`, *optional*):
            Soft-capping bound of the policy's logits.
        ref_logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the reference model's projection.
        ref_softcap (`float`, *optional*):
            Soft-capping bound of the reference model's logits.
        token_tile (`int`, *optional*):
            Tokens in one tile.
        vocab_tile (`int`, *optional*):
            Vocabulary entries in one tile.
        return_statistics (`bool`, *optional*, defaults to `False`):
            Whether to add [`HeadStatistics`] as a fourth element.

    Returns:
        `tuple`: `log_probs`, `ref_log_probs` and `kl`, each `(N,)` float32 in nats, and with `return_statistics` a
        [`HeadStatistics`].

    Raises:
        ValueError: If the vocabularies or numbers of tokens differ, or, on a CPU, a label is outside `[0, V)`.
    """
    policy_weight, policy_bias = _whole(policy_weight), _whole(policy_bias)
    with torch.no_grad():
        ref_weight, ref_bias = _whole(ref_weight), _whole(ref_bias)
    default_tile = CPU_TILE if policy_hidden.device.type == "cpu" else ACCELERATOR_TILE
    options = _Options(
        LogitTransform(policy_logit_scale, policy_softcap),
        LogitTransform(ref_logit_scale, ref_softcap),
        token_tile or default_tile[0],
        vocab_tile or default_tile[1],
        return_statistics,
    )
    outputs = _PairedLogProbs.apply(
        policy_hidden, policy_weight, policy_bias, ref_hidden, ref_weight, ref_bias, labels, options
    )
    log_probs, ref_log_probs, kl, *statistics = outputs
    if return_statistics:
        return log_probs, ref_log_probs, kl, HeadStatistics(*statistics)
    return log_probs, ref_log_probs, kl


def take_kernel_of_hub(device: torch.device) -> None:
    """
    Runs the kernel of the Hub that `TRL_EXT_HUB_KERNELS` names as `trl-ext-paired-log-probs`, if it fits, from now on.

    Args:
        device (`torch.device`):
            Where the models are. Nothing is loaded for a CPU, which runs no such kernel.

    Raises:
        ValueError: If the variable names something that cannot be a kernel.
    """
    global _kernels
    named = named_kernels()
    if device.type == "cuda":
        _kernels = kernel_of_hub("trl-ext-paired-log-probs", triton_kernels) if named else triton_kernels


def head_parameters(head: Any) -> tuple[Any, Any]:
    """Weight and bias of a head, sharded or not. PEFT's wrapper of trained token rows hides the bias."""
    bias = getattr(head, "bias", None)
    return head.weight, getattr(getattr(head, "original_module", None), "bias", None) if bias is None else bias


@contextmanager
def gathered_head(head: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight `(V, H)` and bias `(V,)` of a language-model head, whole, whatever shards them."""
    weight, bias = head_parameters(head)
    with maybe_gather_lm_head_ctx(weight, bias):
        yield _whole(weight), _whole(bias)


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class _Options(NamedTuple):
    policy_transform: LogitTransform
    ref_transform: LogitTransform
    token_tile: int
    vocab_tile: int
    statistics: bool


class _Head(NamedTuple):
    """One model's side: hidden states in the dtype of the projection, weight, bias, and its logit transform."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    transform: LogitTransform

    def weight_tile(self, columns: slice) -> torch.Tensor:
        return self.weight[columns].to(self.hidden.dtype)

    def projection(self, buffer: torch.Tensor, rows: slice, weight_tile: torch.Tensor) -> torch.Tensor:
        """The product of one tile, written into `buffer`."""
        hidden = self.hidden[rows]
        tile = buffer[: hidden.size(0) * weight_tile.size(0)].view(hidden.size(0), weight_tile.size(0))
        if hidden.dtype == tile.dtype:
            torch.mm(hidden, weight_tile.t(), out=tile)
        elif hidden.is_cuda:
            torch.mm(hidden, weight_tile.t(), out_dtype=tile.dtype, out=tile)
        else:
            torch.mm(hidden.to(tile.dtype), weight_tile.t().to(tile.dtype), out=tile)
        return tile

    def logits(self, buffer: torch.Tensor, rows: slice, columns: slice, weight_tile: torch.Tensor) -> torch.Tensor:
        """Logits of one tile, written into `buffer`."""
        tile = self.projection(buffer, rows, weight_tile)
        if self.bias is not None:
            tile.add_(self.bias[columns].to(tile.dtype))
        return self.transform.apply_(tile)

    def side(
        self, buffer: torch.Tensor, rows: slice, columns: slice, weight_tile: torch.Tensor
    ) -> triton_kernels.Side:
        """One tile for the kernels, which make the logits themselves."""
        bias = None if self.bias is None else self.bias[columns].contiguous()
        return triton_kernels.Side(self.projection(buffer, rows, weight_tile), bias, *self.transform)

    def tile_dtype(self, accumulated: torch.dtype) -> torch.dtype:
        """What a tile is held in: the kernels sum in float32 whatever they read."""
        return self.hidden.dtype if _uses_kernels(self.hidden) else accumulated


def _heads(
    policy_hidden: torch.Tensor, ref_hidden: torch.Tensor, parameters: tuple[Any, ...], options: _Options,
    dtype: torch.dtype | None,
) -> tuple[_Head, _Head]:  # fmt: skip
    """Both sides, with hidden states in the dtype of autocast, or their own without it."""
    policy_weight, policy_bias, ref_weight, ref_bias = parameters
    return (
        _Head(policy_hidden.to(dtype or policy_hidden.dtype), policy_weight, policy_bias, options.policy_transform),
        _Head(ref_hidden.to(dtype or ref_hidden.dtype), ref_weight, ref_bias, options.ref_transform),
    )


class _RunningStatistics:
    """Softmax statistics of both models, folded in tile by tile: maxima, sums of exponentials, weighted logits."""

    def __init__(self, num_tokens: int, device: torch.device, dtype: torch.dtype):
        def filled(value: float) -> torch.Tensor:
            return torch.full((num_tokens,), value, device=device, dtype=dtype)

        self.policy_max, self.ref_max = filled(-torch.inf), filled(-torch.inf)
        self.policy_sum, self.ref_sum = filled(0.0), filled(0.0)
        self.policy_label, self.ref_label = filled(0.0), filled(0.0)
        self.policy_weighted, self.gap_weighted = filled(0.0), filled(0.0)
        self.logit_sum = filled(0.0)

    def fold(
        self, policy: torch.Tensor, ref: torch.Tensor, scratch: torch.Tensor, rows: slice, labels: torch.Tensor,
        first_column: int, statistics: bool,
    ) -> None:  # fmt: skip
        """Folds the logits of one tile in; `scratch` has their shape and is overwritten."""
        local = labels[rows] - first_column
        inside = (local >= 0) & (local < policy.size(1))
        local = local.clamp(0, policy.size(1) - 1).unsqueeze(1)
        for logits, label in ((policy, self.policy_label[rows]), (ref, self.ref_label[rows])):
            label.copy_(torch.where(inside, logits.gather(1, local).squeeze(1), label))
        if statistics:
            self.logit_sum[rows] += policy.sum(dim=1)
        weights = _fold_maximum(ref, self.ref_max[rows], scratch, (self.ref_sum[rows], self.gap_weighted[rows]))
        self.ref_sum[rows] += weights.sum(dim=1)
        self.gap_weighted[rows] += weights.mul_(ref.sub_(policy)).sum(dim=1)
        accumulated = (self.policy_sum[rows], self.policy_weighted[rows])
        weights = _fold_maximum(policy, self.policy_max[rows], scratch, accumulated)
        self.policy_sum[rows] += weights.sum(dim=1)
        if statistics:
            self.policy_weighted[rows] += weights.mul_(policy).sum(dim=1)

    def of_rows(self, rows: slice) -> triton_kernels.Running:
        """What the kernels write."""
        return triton_kernels.Running(*(getattr(self, name)[rows] for name in triton_kernels.Running._fields))

    def policy_log_normalizer(self) -> torch.Tensor:
        return self.policy_max + self.policy_sum.log()

    def ref_log_normalizer(self) -> torch.Tensor:
        return self.ref_max + self.ref_sum.log()


def _fold_maximum(
    logits: torch.Tensor, maximum: torch.Tensor, scratch: torch.Tensor, accumulated: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Raises the running maximum, rescales what was accumulated under the old one, and returns `exp(logits - max)`."""
    new_maximum = torch.maximum(maximum, logits.amax(dim=1))
    rescale = torch.exp(maximum - new_maximum)
    for total in accumulated:
        total.mul_(rescale)
    maximum.copy_(new_maximum)
    return torch.sub(logits, new_maximum.unsqueeze(1), out=scratch).exp_()


def _uses_kernels(hidden: torch.Tensor) -> bool:
    return hidden.is_cuda and triton_kernels.AVAILABLE and hidden.dtype != torch.float64


def _tiles(size: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(start + tile, size)) for start in range(0, size, tile))


def _check(
    policy_hidden: torch.Tensor, ref_hidden: torch.Tensor, labels: torch.Tensor, sizes: tuple[int, int]
) -> None:
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`policy_weight` has a vocabulary of {sizes[0]} and `ref_weight` of {sizes[1]}: the divergence needs one "
            "vocabulary. Resize the embeddings of one of the models."
        )
    if not policy_hidden.size(0) == ref_hidden.size(0) == labels.size(0):
        raise ValueError(
            f"`policy_hidden`, `ref_hidden` and `labels` must have one row per token, got {policy_hidden.size(0)}, "
            f"{ref_hidden.size(0)} and {labels.size(0)}. Select the same positions for all three."
        )
    # On an accelerator the check would wait for the device
    if labels.device.type == "cpu" and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < sizes[0]:
        raise ValueError(
            f"`labels` must lie in [0, {sizes[0]}), got values from {int(labels.min())} to {int(labels.max())}. Drop "
            "the positions labelled -100 first."
        )


class _PairedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, policy_hidden, policy_weight, policy_bias, ref_hidden, ref_weight, ref_bias, labels, options
    ):  # fmt: skip
        ctx.set_materialize_grads(False)
        device, num_tokens = policy_hidden.device, policy_hidden.size(0)
        dtype = torch.float64 if policy_hidden.dtype == torch.float64 else torch.float32
        autocast = torch.is_autocast_enabled(device.type)
        projection_dtype = torch.get_autocast_dtype(device.type) if autocast else None
        running = _RunningStatistics(num_tokens, device, dtype)
        parameters = (policy_weight, policy_bias, ref_weight, ref_bias)
        with torch.autocast(device.type, enabled=False), maybe_gather_lm_head_ctx(*parameters):
            _check(policy_hidden, ref_hidden, labels, (policy_weight.size(0), ref_weight.size(0)))
            policy, ref = _heads(policy_hidden, ref_hidden, parameters, options, projection_dtype)
            vocab_size = policy_weight.size(0)
            has_kernels = _uses_kernels(policy.hidden)
            walk = _walk(policy, ref, vocab_size, options, dtype, 2 if has_kernels else 3)
            for columns, rows, buffers, weight_tiles in walk:
                places = [(buffers[side], rows, columns, weight_tiles[side]) for side in range(2)]
                if has_kernels:
                    sides = policy.side(*places[0]), ref.side(*places[1])
                    _kernels.fold(*sides, running.of_rows(rows), labels[rows], columns.start)
                    continue
                policy_logits, ref_logits = policy.logits(*places[0]), ref.logits(*places[1])
                scratch = buffers[2][: policy_logits.numel()].view_as(policy_logits)
                running.fold(policy_logits, ref_logits, scratch, rows, labels, columns.start, options.statistics)
        policy_normalizer, ref_normalizer = running.policy_log_normalizer(), running.ref_log_normalizer()
        log_probs = running.policy_label - policy_normalizer
        ref_log_probs = running.ref_label - ref_normalizer
        # Rounding can leave the KL of two equal distributions just below zero
        kl = (running.gap_weighted / running.ref_sum - ref_normalizer + policy_normalizer).clamp_min(0.0)
        ctx.save_for_backward(
            policy_hidden, policy_weight, policy_bias, ref_hidden, ref_weight, ref_bias, labels, policy_normalizer,
            ref_normalizer,
        )  # fmt: skip
        ctx.options, ctx.projection_dtype = options, projection_dtype
        ctx.mark_non_differentiable(ref_log_probs)
        if not options.statistics:
            return log_probs, ref_log_probs, kl
        entropy = policy_normalizer - running.policy_weighted / running.policy_sum
        mean_logits = running.logit_sum / vocab_size
        is_top1 = running.policy_label >= running.policy_max
        ctx.mark_non_differentiable(ref_log_probs, entropy, mean_logits, is_top1)
        return log_probs, ref_log_probs, kl, entropy, mean_logits, is_top1

    @staticmethod
    def backward(ctx, grad_log_probs, _grad_ref, grad_kl, *_statistics):  # type: ignore[override]
        policy_hidden, policy_weight, policy_bias, ref_hidden, ref_weight, ref_bias, labels, *normalizers = (
            ctx.saved_tensors
        )
        if grad_log_probs is None and grad_kl is None:
            return (None,) * 8
        dtype = normalizers[0].dtype
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(normalizers[0])
        alive = _alive_tokens(grad_log_probs, grad_kl)
        per_token = (policy_hidden, ref_hidden, labels, *normalizers, grad_log_probs, grad_kl)
        if alive is not None:
            per_token = tuple(None if values is None else values[alive] for values in per_token)
        live_hidden, live_ref_hidden, live_labels, *live_normalizers, grad_log_probs, grad_kl = per_token
        gradients = _Gradients(ctx.needs_input_grad[:3], live_hidden, dtype)
        device = policy_hidden.device
        parameters = (policy_weight, policy_bias, ref_weight, ref_bias)
        with torch.autocast(device.type, enabled=False), maybe_gather_lm_head_ctx(*parameters):
            policy, ref = _heads(live_hidden, live_ref_hidden, parameters, ctx.options, ctx.projection_dtype)
            gradients.allocate_head(policy_weight, policy_bias, len(live_labels))
            has_kernels = _uses_kernels(policy.hidden)
            num_buffers = 3 if policy.transform.softcap and not has_kernels else 2
            walk = _walk(policy, ref, policy_weight.size(0), ctx.options, dtype, num_buffers)
            for columns, rows, buffers, weight_tiles in walk:
                per_row = [normalizer[rows] for normalizer in live_normalizers], grad_log_probs[rows]
                divergence = None if grad_kl is None else grad_kl[rows]
                places = [(buffers[side], rows, columns, weight_tiles[side]) for side in range(2)]
                if has_kernels:
                    sides = policy.side(*places[0]), None if divergence is None else ref.side(*places[1])
                    gradient = _kernels.logit_gradient_(*sides, *per_row, divergence, live_labels[rows], columns.start)
                else:
                    logits = policy.logits(*places[0])
                    capped = None
                    if policy.transform.softcap is not None:
                        capped = buffers[2][: logits.numel()].view_as(logits).copy_(logits)
                    ref_logits = None if divergence is None else ref.logits(*places[1])
                    local = live_labels[rows] - columns.start
                    gradient = _logit_gradient_(logits, ref_logits, *per_row, divergence, local)
                    policy.transform.chain_(gradient, capped)
                gradients.add(gradient, policy.hidden[rows], weight_tiles[0], rows, columns)
        return (*gradients.finish(policy_hidden, policy_weight, policy_bias, alive), *(None,) * 5)


def _alive_tokens(grad_log_probs: torch.Tensor, grad_kl: torch.Tensor | None) -> torch.Tensor | None:
    """Indices of the tokens that either gradient reaches, `None` where it reaches all. A NaN counts as reached."""
    reached = grad_log_probs != 0 if grad_kl is None else (grad_log_probs != 0) | (grad_kl != 0)
    alive = reached.nonzero().view(-1)
    return None if alive.numel() == reached.numel() else alive


def _walk(
    policy: _Head, ref: _Head, vocab_size: int, options: _Options, dtype: torch.dtype, num_buffers: int
) -> Iterator[tuple[slice, slice, list[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    """Vocabulary tiles outside, token tiles inside, so that each weight tile is read and converted once."""
    # The first two buffers are for the heads' tiles, a third for what is computed of them
    num_tokens = policy.hidden.size(0)
    size = min(num_tokens, options.token_tile) * min(vocab_size, options.vocab_tile)
    dtypes = [policy.tile_dtype(dtype), ref.tile_dtype(dtype), dtype][:num_buffers]
    buffers = [torch.empty(size, device=policy.hidden.device, dtype=kind) for kind in dtypes]
    for columns in _tiles(vocab_size, options.vocab_tile):
        weight_tiles = (policy.weight_tile(columns), ref.weight_tile(columns))
        for rows in _tiles(num_tokens, options.token_tile):
            yield columns, rows, buffers, weight_tiles


def _logit_gradient_(
    logits: torch.Tensor,
    ref_logits: torch.Tensor | None,
    normalizers: list[torch.Tensor],
    grad_log_probs: torch.Tensor,
    grad_kl: torch.Tensor | None,
    local_labels: torch.Tensor,
) -> torch.Tensor:
    """`(g_kl - g_log_prob) p_policy - g_kl p_ref + g_log_prob onehot(label)`, in place of the policy's logits."""
    coefficient = -grad_log_probs if grad_kl is None else grad_kl - grad_log_probs
    gradient = logits.sub_(normalizers[0].unsqueeze(1)).exp_().mul_(coefficient.unsqueeze(1))
    if ref_logits is not None and grad_kl is not None:
        gradient.addcmul_(ref_logits.sub_(normalizers[1].unsqueeze(1)).exp_(), -grad_kl.unsqueeze(1))
    inside = (local_labels >= 0) & (local_labels < logits.size(1))
    index = local_labels.clamp(0, logits.size(1) - 1).unsqueeze(1)
    return gradient.scatter_add_(1, index, torch.where(inside, grad_log_probs, 0.0).unsqueeze(1).to(gradient.dtype))


class _Gradients:
    """Gradients of the policy's hidden states, weight and bias, summed over tiles in float32 or wider."""

    def __init__(self, needed: tuple[bool, ...], policy_hidden: torch.Tensor, dtype: torch.dtype):
        self.needed, self.dtype = needed, dtype
        self.hidden = policy_hidden.new_zeros(policy_hidden.shape, dtype=dtype) if needed[0] else None
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    def allocate_head(self, weight: torch.Tensor, bias: torch.Tensor | None, num_tokens: int) -> None:
        # The first tile of tokens writes the weight's; without tokens nothing would
        make = weight.new_empty if num_tokens else weight.new_zeros
        self.weight = make(weight.shape, dtype=self.dtype) if self.needed[1] else None
        self.bias = bias.new_zeros(bias.shape, dtype=self.dtype) if bias is not None and self.needed[2] else None

    def add(
        self, gradient: torch.Tensor, hidden: torch.Tensor, weight_tile: torch.Tensor, rows: slice, columns: slice
    ) -> None:
        if self.bias is not None:
            self.bias[columns] += gradient.sum(dim=0, dtype=self.dtype)
        rounded = gradient.to(hidden.dtype)
        if self.hidden is not None:
            _add_product_(self.hidden[rows], rounded, weight_tile)
        if self.weight is not None:
            _add_product_(self.weight[columns], rounded.t(), hidden, first=rows.start == 0)

    def finish(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, alive: torch.Tensor | None
    ) -> tuple[Any, Any, Any]:
        if self.hidden is not None and alive is not None:
            self.hidden = self.hidden.new_zeros(hidden.shape).index_copy_(0, alive, self.hidden)
        totals = ((self.hidden, hidden), (self.weight, weight), (self.bias, bias))
        return tuple(None if total is None else total.to(like.dtype) for total, like in totals)  # type: ignore


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool = False) -> None:
    """Adds `a @ b`, or writes it where it is the first, whatever stood there."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)
