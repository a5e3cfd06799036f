"""The layered recurrent network and its vector field, the paper's `F(theta, u, x)`.

Neuron `i` of layer `l` has the membrane `u` and the activity `r = phi(u)`. Layers are coupled to neighbours only:

    du_l/dt = -u_l + Wf_{l-1} r_{l-1} + Wb_l r_{l+1} + drive_l

`Wf_l` leads from layer `l` to `l + 1`, `Wb_l` back. Activities and drives are lists over the layers, rows are samples.

What runs is the fixed point: [`relax`] sweeps `r_l = phi(current_l)`, with [`LayeredNetwork.current`], until it holds,
where the field is zero; tests/equilibrium/test_network.py holds the two equal.
"""

import math
from dataclasses import dataclass

import torch

from .activations import Activation


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
    Weights of a chain of `L` layers and their activation.

    Attributes:
        forward_weights (`list[torch.Tensor]` of `L - 1` matrices of shape `(n_{l+1}, n_l)`):
            From each layer to the next one.
        backward_weights (`list[torch.Tensor]` of `L - 1` matrices of shape `(n_l, n_{l+1})`):
            From each layer to the one before.
        activation ([`Activation`]):
            `phi`.
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
        Input current of a layer, to which its membrane is equal at a fixed point.

        Args:
            layer (`int`):
                Index from 0.
            activities (`list[torch.Tensor]` of shapes `(rows, n_l)`):
                State; `None` for a layer that is silent. The layer's own activity is not used.
            drive (`torch.Tensor` of shape `(rows, n_layer)` or `(n_layer,)`, or `None`):
                Constant current.

        Returns:
            `torch.Tensor` of shape `(rows, n_layer)`.
        """
        total = drive
        for neighbour, weights in ((layer - 1, self.forward_weights), (layer + 1, self.backward_weights)):
            activity = activities[neighbour] if 0 <= neighbour < self.num_layers else None
            if activity is None:
                continue
            weight = weights[min(layer, neighbour)].T
            if total is None:
                total = activity @ weight
            elif total is drive:
                total = torch.addmm(total, activity, weight)
            else:
                total.addmm_(activity, weight)
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
        """Bound on each weight's spectral norm under which the relaxation is a contraction: `|W|_2 phi'_max < 1`."""
        return 1 / (2 * math.cos(math.pi / (self.num_layers + 1)) * self.activation.max_slope)
