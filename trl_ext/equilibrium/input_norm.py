"""Running mean and variance of a head's input, which bring it to zero mean and unit variance.

    (x - mean) / sqrt(variance + eps)

An offset that all inputs have in common saturates a network of bounded units, whatever its weights. As in batch
normalisation the statistics are of each feature over rows, without a scale or shift that learns. Unlike there,
training uses the running statistics too, after they took in its batch, as constants of the gradient: a row's result
depends on no other row but through them, a batch of one works, and training and evaluation are one function.
"""

from typing import Literal

import torch
from torch import distributed


InputNormName = Literal["none", "center", "standardize"]
# Weight of a batch in the running statistics, once as many batches were seen that their plain mean gives it less
MOMENTUM = 0.1
EPS = 1e-5


@torch.no_grad()
def update_statistics(
    mean: torch.Tensor, variance: torch.Tensor | None, num_batches: torch.Tensor, rows: torch.Tensor
) -> None:
    """
    Takes a batch into the running statistics, in place: with weight `1 / (k + 1)` after `k` batches, and at least 0.1.

    Under `torch.distributed` the batch is that of all processes: every one must call this as often as the others.

    Args:
        mean (`torch.Tensor` of shape `(n,)`):
            Running mean.
        variance (`torch.Tensor` of shape `(n,)` or `None`):
            Running mean of the batches' variances, each about its own mean and divided by the number of rows.
        num_batches (`torch.Tensor`, scalar, int64):
            Batches so far, `k`.
        rows (`torch.Tensor` of shape `(rows, n)`, float32 or float64):
            The batch. One without rows on all processes changes nothing.
    """
    shift = mean.double()  # sums of squares about a value near the mean do not cancel
    centred = rows.double() - shift
    sums = torch.cat([centred.sum(0), centred.square().sum(0), centred.new_tensor([len(rows)])])
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(sums)
    count = sums[-1]
    if count == 0:
        return
    offset, square = (sums[:-1] / count).chunk(2)
    weight = max(1 / (num_batches.item() + 1), MOMENTUM)
    mean.copy_(shift + weight * offset)
    if variance is not None:
        variance.lerp_((square - offset.square()).clamp_min(0).to(variance.dtype), weight)
    num_batches += 1


def normalize(rows: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor | None) -> torch.Tensor:
    """`(rows - mean) / sqrt(variance + eps)`, or `rows - mean` without a variance, in the dtype of `rows`."""
    centred = rows - mean.to(rows.dtype)
    return centred if variance is None else centred * torch.rsqrt(variance.to(rows.dtype) + EPS)
