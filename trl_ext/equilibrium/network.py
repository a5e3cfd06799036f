"""The layered recurrent network and its vector field, the paper's `F(theta, u, x)`.

Neuron `i` of layer `l` has the membrane `u` and the activity `r = phi(u)`. Layers are coupled to neighbours only:

    du_l/dt = -u_l + Wf_{l-1} r_{l-1} + Wb_l r_{l+1} + drive_l

`Wf_l` leads from layer `l` to `l + 1`, `Wb_l` back. Activities and drives are lists over the layers, rows are samples.

What runs is the fixed point: [`relax`] sweeps `r_l = phi(current_l)`, with [`LayeredNetwork.current`], until it holds,
where the field is zero; tests/equilibrium/test_network.py holds the two equal. Sweeps contract, whatever the input,
where every weight's spectral norm is below [`contraction_bound`]; [`cap_singular_values`] holds it there.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .activations import Activation


def contraction_bound(num_layers: int, activation: Activation) -> float:
    r"""
    Spectral norm of the recurrent weights below which every relaxation contracts, at any input and with any feedback:

        c_L = 1 / (2 m cos(pi / (L + 1)))        for L layers and an activation whose slope is at most m

    Proof. Let two states of the network differ by `d_l` in layer `l`, with norms `y_l = |d_l|_2`, and let every
    weight's spectral norm be at most `c`. An update of layer `l` makes its new difference at most

        y_l  <-  m |Wf_{l-1} d_{l-1} + Wb_l d_{l+1}|  <=  m c (y_{l-1} + y_{l+1})        with y_0 = y_{L+1} = 0.

    Take `v_l = sin(pi l / (L + 1)) > 0`, for which `v_{l-1} + v_{l+1} = 2 cos(pi / (L + 1)) v_l`, and let `t` be the
    largest of `y_l / v_l`. The update leaves `y_l <= q t v_l` with `q = 2 m c cos(pi / (L + 1)) = c / c_L`. A sweep
    updates the layers of one parity from the others, `y_l <= q t v_l`, and then the others from those, `y_l <= q^2 t
    v_l`. So where `c < c_L`, differences shrink by `q^2` in every sweep, in the norm `max_l |d_l|_2 / v_l`: there is
    one fixed point, and each relaxation goes to it. Only norms were used: the weights may be rectangular, and feedback
    need not be symmetric. The response to an infinitesimal nudge obeys the same inequality, also with all weights
    transposed, and so does that to a finite nudge along the real axis.

    The bound is the largest for which this holds: square weights `c` times the identity, all of them, and unsaturated
    units reach it. It falls with depth, from `1 / m` at two layers to `1 / (2 m)`: "below 1" is enough for two only.

    Args:
        num_layers (`int`):
            `L`. A single layer has no recurrent weights.
        activation ([`Activation`]):
            Gives `m`, its `max_slope`.

    Returns:
        `float`: `c_L`, infinite for a single layer.
    """
    if num_layers == 1:
        return math.inf
    return 1 / (2 * math.cos(math.pi / (num_layers + 1)) * activation.max_slope)


# The decomposition is taken only of a weight that needs it, which its values tell
@torch.compiler.disable  # type: ignore[untyped-decorator]
def cap_singular_values(weight: torch.Tensor, cap: float) -> torch.Tensor:
    """
    The nearest matrix whose singular values are at most `cap`, as a differentiable function of the weight:

        P(W)  =  sum_i min(s_i, cap) u_i v_i^T  =  W h(W^T W)        with h(s^2) = min(1, cap / s)

    for `W = sum_i s_i u_i v_i^T`. A weight within the cap, which a Cholesky factor of `cap^2 - W^T W` proves, is
    handed back itself. Of any other the smaller Gram matrix is decomposed. Nothing is written into the weight, which
    an engine may have sharded or keep a master copy of, and nothing is remembered between calls. The gradient is
    exact, by divided differences of `h`:

        dP = dW h + W V (h_1 o V^T d(W^T W) V) V^T        with h_1[ij] = (h_i - h_j) / (s_i^2 - s_j^2)

    Args:
        weight (`torch.Tensor` of shape `(m, n)`, float32 or float64):
            `W`.
        cap (`float`):
            Bound.

    Returns:
        `torch.Tensor` of shape `(m, n)`: `W` itself where it is within the cap, or is not finite.
    """
    values = weight.detach()
    gram = values @ values.T if values.shape[0] < values.shape[1] else values.T @ values
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    is_within = torch.linalg.cholesky_ex(cap * cap * identity - gram).info == 0
    if torch.logical_or(is_within, ~gram.isfinite().all()).item():
        return weight
    capped: torch.Tensor = _CappedSingularValues.apply(weight, cap)  # type: ignore[no-untyped-call]
    return capped


class _CappedSingularValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, cap: float) -> torch.Tensor:
        tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
        squares, vectors = torch.linalg.eigh(tall.T @ tall)
        singular = squares.clamp_min(0).sqrt()
        ctx.cap = cap
        ctx.save_for_backward(weight, singular, vectors)
        capped = tall - tall @ _excess(singular, vectors, cap)
        return capped if tall is weight else capped.T.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        weight, singular, vectors = ctx.saved_tensors
        is_tall = weight.shape[0] >= weight.shape[1]
        tall, gradient = (weight, grad_output) if is_tall else (weight.T, grad_output.T)
        larger = singular.clamp_min(ctx.cap)
        # (h_i - h_j) / (s_i^2 - s_j^2) without a difference of nearly equal values: the share is 1 for two values
        # above the cap, 0 for two below, and between for one of each
        difference = singular.unsqueeze(1) - singular
        share = (larger.unsqueeze(1) - larger) / difference
        is_above = singular > ctx.cap
        both = is_above.unsqueeze(1) & is_above
        share = torch.where(both, 1.0, torch.where(difference == 0, 0.0, share))
        total = (singular.unsqueeze(1) + singular).clamp_min(torch.finfo(singular.dtype).tiny)
        divided = -ctx.cap * share / (larger.unsqueeze(1) * larger * total)
        inner = vectors.T @ (tall.T @ gradient) @ vectors
        inner = vectors @ (divided * (inner + inner.T)) @ vectors.T
        result = gradient - gradient @ _excess(singular, vectors, ctx.cap) + tall @ inner
        return (result if is_tall else result.T), None


def _excess(singular: torch.Tensor, vectors: torch.Tensor, cap: float) -> torch.Tensor:
    """`1 - h(W^T W)`, of shape `(n, n)`: the share of each direction that the cap takes away."""
    return (vectors * (1 - cap / singular.clamp_min(cap))) @ vectors.T


def vector_field(
    network: "LayeredNetwork", membranes: list[torch.Tensor], drives: list[torch.Tensor]
) -> list[torch.Tensor]:
    """
    `du/dt` of every layer, as the equation above stands; zero at a fixed point. Run by tests only.

    Args:
        network ([`LayeredNetwork`]):
            Weights and activation.
        membranes (`list[torch.Tensor]` of shapes `(rows, n_l)`):
            `u`.
        drives (`list[torch.Tensor]` of shapes `(rows, n_l)` or `(n_l,)`):
            Constant currents.

    Returns:
        `list[torch.Tensor]` of shapes `(rows, n_l)`.
    """
    activities = [network.activation.value(membrane) for membrane in membranes]
    field = [drive - membrane for membrane, drive in zip(membranes, drives, strict=True)]
    for layer, (forward, backward) in enumerate(zip(network.forward_weights, network.backward_weights, strict=True)):
        field[layer + 1] = field[layer + 1] + activities[layer] @ forward.T
        field[layer] = field[layer] + activities[layer + 1] @ backward.T
    return field


@dataclass
class LayeredNetwork:
    """
    A chain of `L` layers: `L - 1` forward weights of shapes `(n_{l+1}, n_l)`, from each layer to the next one, as many
    backward weights of shapes `(n_l, n_{l+1})`, from each to the one before, and the activation `phi`.
    """

    forward_weights: list[torch.Tensor]
    backward_weights: list[torch.Tensor]
    activation: Activation

    @property
    def num_layers(self) -> int:
        return len(self.forward_weights) + 1

    def transposed(self) -> "LayeredNetwork":
        """The network with the transposed weight matrix: each forward weight trades places with its partner."""
        return LayeredNetwork(
            [weight.T for weight in self.backward_weights],
            [weight.T for weight in self.forward_weights],
            self.activation,
        )

    def current(self, layer: int, activities: list[torch.Tensor | None], drive: torch.Tensor | None) -> torch.Tensor:
        """
        Input current `(rows, n_l)` of a layer, from 0, to which its membrane is equal at a fixed point. Activities are
        `(rows, n_l)`, or `None` for a silent layer; the drive is `(rows, n_l)`, `(n_l,)` or `None`.
        """
        total = drive
        for neighbour, weights in ((layer - 1, self.forward_weights), (layer + 1, self.backward_weights)):
            activity = activities[neighbour] if 0 <= neighbour < self.num_layers else None
            if activity is None:
                continue
            weight = weights[min(layer, neighbour)].T
            # Out of place: `torch.vmap` has no rule for `addmm_`
            total = activity @ weight if total is None else torch.addmm(total, activity, weight)
        assert total is not None
        return total.clone() if total is drive else total

    def weight_matrix(self) -> torch.Tensor:
        """All weights as one matrix `W` of shape `(n, n)`, with the layers in order along both axes."""
        widths = [self.backward_weights[0].shape[0], *(weight.shape[0] for weight in self.forward_weights)]
        starts = [sum(widths[:layer]) for layer in range(len(widths) + 1)]
        matrix = self.forward_weights[0].new_zeros(starts[-1], starts[-1])
        for layer, (forward, backward) in enumerate(zip(self.forward_weights, self.backward_weights, strict=True)):
            here = slice(starts[layer], starts[layer + 1])
            above = slice(starts[layer + 1], starts[layer + 2])
            matrix[above, here], matrix[here, above] = forward, backward
        return matrix

    def spectral_norms(self) -> list[float]:
        """Largest singular value of every weight, forward weights first."""
        return [
            torch.linalg.matrix_norm(weight.float(), ord=2).item()
            for weight in [*self.forward_weights, *self.backward_weights]
        ]

    def safe_spectral_cap(self) -> float:
        """[`contraction_bound`] of this depth and activation."""
        return contraction_bound(self.num_layers, self.activation)
