"""The Jacobian homeostasis objective, which makes feedback symmetric, and measures of asymmetry.

    E[|J e|^2 - e^T J^2 e] / n  =  2 |A|_F^2 / n  =  sum_l |Wf_l - Wb_l^T|_F^2 / n

over Gaussian `e`, with the Jacobian `J = W - 1` of the vector field in the activities, its antisymmetric part `A` and
`n` neurons: in a chain of layers `A` lies in the pairs of reciprocal weights only. What runs is the last, closed form,
without noise and local to each pair; tests/equilibrium/test_homeostasis.py holds it equal to the first, the paper's.
"""

import math
from collections.abc import Sequence

import torch


def homeostasis_loss(
    forward_weights: Sequence[torch.Tensor],
    backward_weights: Sequence[torch.Tensor],
    num_probes: int | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    The objective above. It depends on no state and no input.

    Args:
        forward_weights (`Sequence[torch.Tensor]` of shapes `(n_{l+1}, n_l)`):
            Weights to the next layer.
        backward_weights (`Sequence[torch.Tensor]` of shapes `(n_l, n_{l+1})`):
            Weights to the layer before.
        num_probes (`int`, *optional*):
            Number of Gaussian probes. By default the closed form is computed. The paper draws 5 for each sample.
        generator (`torch.Generator`, *optional*):
            Source of the probes.

    Returns:
        `torch.Tensor`: scalar, in float32 or float64.

    Raises:
        ValueError: If `num_probes` is not positive.
    """
    if num_probes is not None and num_probes < 1:
        raise ValueError(f"`num_probes` must be at least 1, or None for the closed form, got {num_probes}.")
    if not forward_weights:
        return torch.zeros(())
    dtype = torch.promote_types(forward_weights[0].dtype, torch.float32)
    device = forward_weights[0].device
    with torch.autocast(device.type, enabled=False):
        forward = [weight.to(dtype) for weight in forward_weights]
        backward = [weight.to(dtype) for weight in backward_weights]
        num_neurons = forward[0].shape[1] + sum(weight.shape[0] for weight in forward)
        if num_probes is None:
            differences = [w.sub(partner.T).square().sum() for w, partner in zip(forward, backward, strict=True)]
            return torch.stack(differences).sum() / num_neurons
        widths = [forward[0].shape[1], *(weight.shape[0] for weight in forward)]
        probes = [torch.randn(num_probes, width, generator=generator, dtype=dtype, device=device) for width in widths]
        once = jacobian_product(forward, backward, probes)
        twice = jacobian_product(forward, backward, once)
        total = sum((j.square() - e * jj).sum() for e, j, jj in zip(probes, once, twice, strict=True))
        assert isinstance(total, torch.Tensor)
        return total / (num_probes * num_neurons)


def jacobian_product(
    forward_weights: Sequence[torch.Tensor], backward_weights: Sequence[torch.Tensor], vectors: list[torch.Tensor]
) -> list[torch.Tensor]:
    """`J v` for `J = W - 1`, row by row; `v`, of shapes `(rows, n_l)`, is split into layers."""
    products = [-vector for vector in vectors]
    for layer, (forward, backward) in enumerate(zip(forward_weights, backward_weights, strict=True)):
        products[layer + 1] = products[layer + 1] + vectors[layer] @ forward.T
        products[layer] = products[layer] + vectors[layer + 1] @ backward.T
    return products


@torch.no_grad()
def symmetry_measure(weight_matrix: torch.Tensor) -> float:
    """
    The paper's `|S| / (|S| + |A|)` in Frobenius norms, with the symmetric part `S` and the antisymmetric part `A` of
    the Jacobian `W - 1`, for all weights as one matrix `W`, [`LayeredNetwork.weight_matrix`]: 1 for symmetric ones.
    """
    jacobian = weight_matrix - torch.eye(len(weight_matrix), dtype=weight_matrix.dtype, device=weight_matrix.device)
    symmetric = (jacobian + jacobian.T).norm().item()
    antisymmetric = (jacobian - jacobian.T).norm().item()
    return symmetric / (symmetric + antisymmetric)


@torch.no_grad()
def weight_angle(forward_weight: torch.Tensor, backward_weight: torch.Tensor) -> float:
    """Angle in degrees between a forward weight and its transposed partner, as vectors."""
    forward, backward = forward_weight.double().flatten(), backward_weight.T.double().flatten()
    cosine = (forward @ backward / (forward.norm() * backward.norm())).item()
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
