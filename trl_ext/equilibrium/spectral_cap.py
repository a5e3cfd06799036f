"""A bound on the singular values of a weight, as a differentiable function of it.

    W - sum_i max(s_i - cap, 0) u_i v_i^T

the nearest matrix to `W = sum_i s_i u_i v_i^T` whose singular values are at most `cap`; [`EPHead`] runs with it at
every forward. Nothing is written into the weight: what is written into a sharded parameter, or into the low-precision
copy of one, is lost.
"""

import torch


# So many singular values can be above the cap before a call falls back on a whole decomposition, as exact and dearer
SUBSPACE_SIZE = 8
# Of a call, which starts from the vectors of the last one. A weight moves little in a step, so few do: with two
# tests/equilibrium/test_spectral_cap.py finds weights within 1 % of the cap after three calls from random vectors
POWER_ITERATIONS = 2


def cap_singular_values(weight: torch.Tensor, start: torch.Tensor, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Caps the singular values; see the equation above.

    Args:
        weight (`torch.Tensor` of shape `(m, n)`, float32 or float64):
            `W`. The singular vectors are held fixed in its gradient, which then has no part along a capped direction:
            what is above the cap does not grow, and for an excess that is small the gradient is exact.
        start (`torch.Tensor` of shape `(n, k)`):
            Right vectors of an earlier call, or random ones.
        cap (`float`):
            Bound.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the capped matrix, and the right vectors of shape `(n, k)` to start from
        next time.
    """
    left, right = leading_singular_vectors(weight, start.to(weight.dtype), cap)
    values = (left * (weight @ right)).sum(dim=0)
    excess = torch.relu(values - cap)
    return weight - (left * excess) @ right.T, right[:, : start.shape[1]]


@torch.no_grad()
def leading_singular_vectors(
    weight: torch.Tensor, start: torch.Tensor, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Singular vectors of all singular values above a cap, by subspace iteration, or by a whole decomposition if more of
    them are above it than the subspace has dimensions.

    Args:
        weight (`torch.Tensor`):
            See [`cap_singular_values`], as of the others.
        start (`torch.Tensor`):
            Right vectors to start from.
        cap (`float`):
            Bound.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: left vectors of shape `(m, k')` and right vectors of shape `(n, k')`,
        leading first, with `k'` at least `k`.
    """
    right = torch.linalg.qr(start).Q
    for _ in range(POWER_ITERATIONS):
        right = torch.linalg.qr(weight.T @ (weight @ right)).Q
    left, values, turn = torch.linalg.svd(weight @ right, full_matrices=False)
    right = right @ turn.T
    if values[-1] > cap and start.shape[1] < min(weight.shape):
        left, _, right_t = torch.linalg.svd(weight, full_matrices=False)
        right = right_t.T
    return left, right
