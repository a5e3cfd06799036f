"""The layered recurrent network: activations, weights and vector field.

Neuron `i` of layer `l` has the membrane `u` and the activity `r = phi(u)`. Layers are coupled to neighbours only:

    du_l/dt = -u_l + Wf_{l-1} r_{l-1} + Wb_l r_{l+1} + drive_l

`Wf_l` leads from layer `l` to `l + 1`, `Wb_l` back. Activities and drives are lists over the layers, rows are samples.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch


ActivationName = Literal["tanh", "dsilu", "sigmoid"]
Constants = tuple[torch.Tensor, ...]


class Activation(Protocol):
    """
    A complex-differentiable activation `phi`.

    `difference` is `phi(u + v) - phi(u)` without the cancellation that subtraction would bring for small `v`, and
    `odd_difference` half of `phi(u + v) - phi(u - v)`. What they need of `u` comes from `constants`, which need `u`
    itself only where `needs_membrane` says so, else `phi(u)`. Complex values are pairs of real and imaginary part.
    """

    max_slope: float
    max_curvature: float
    needs_membrane: bool

    def value(self, membrane: torch.Tensor) -> torch.Tensor: ...

    def constants(self, activity: torch.Tensor, membrane: torch.Tensor | None) -> Constants: ...

    def slope(self, constants: Constants) -> torch.Tensor: ...

    def difference(self, constants: Constants, shift: torch.Tensor) -> torch.Tensor: ...

    def complex_difference(
        self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def odd_difference(self, constants: Constants, shift: torch.Tensor) -> torch.Tensor: ...

    def odd_imaginary_difference(self, constants: Constants, imaginary: torch.Tensor) -> torch.Tensor: ...

    def odd_complex_difference(
        self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def tanh_difference(tanh: torch.Tensor, slope: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`tanh(u + v) - tanh(u)` from `tanh(u)`, `1 - tanh(u)^2` and `v`, by the addition theorem."""
    moved = torch.tanh(shift)
    scale = torch.mul(tanh, moved).add_(1)
    return torch.div(slope, scale, out=scale).mul_(moved)


def complex_tanh_difference(
    tanh: torch.Tensor, slope: torch.Tensor, real: torch.Tensor, imaginary: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tanh(u + a + ib) - tanh(u)` for real `u`, as real and imaginary part."""
    p, q = torch.tanh(real), torch.tan(imaginary)
    shifted = torch.mul(tanh, p).add_(1)
    turned = torch.add(tanh, p).mul_(q)
    scale = shifted.square().addcmul_(turned, turned)
    torch.div(slope, scale, out=scale)
    real_part = torch.mul(p, shifted).addcmul_(q, turned).mul_(scale)
    imaginary_part = q.mul_(shifted).addcmul_(p, turned, value=-1).mul_(scale)
    return real_part, imaginary_part


def odd_tanh_difference(tanh: torch.Tensor, slope: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`(tanh(u + v) - tanh(u - v)) / 2`."""
    moved = torch.tanh(shift)
    scale = torch.mul(tanh, moved).square_().neg_().add_(1)
    return torch.div(slope, scale, out=scale).mul_(moved)


def odd_imaginary_tanh_difference(tanh: torch.Tensor, slope: torch.Tensor, imaginary: torch.Tensor) -> torch.Tensor:
    """`(tanh(u + ib) - tanh(u - ib)) / 2i`."""
    moved = torch.tan(imaginary)
    scale = torch.mul(tanh, moved).square_().add_(1)
    return torch.div(slope, scale, out=scale).mul_(moved)


def odd_complex_tanh_difference(
    tanh: torch.Tensor, slope: torch.Tensor, real: torch.Tensor, imaginary: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(tanh(u + v) - tanh(u - v)) / 2` for `v = a + ib`, as real and imaginary part."""
    p, q = torch.tanh(real), torch.tan(imaginary)
    p_squared, q_squared = p.square(), q.square()
    scale = torch.mul(p_squared, q_squared).add_(1)
    # x + iy = tanh(v)
    x = q_squared.add_(1).mul_(p).div_(scale)
    y = p_squared.neg_().add_(1).mul_(q).div_(scale)
    squared = tanh.square()
    turned = torch.mul(x, y).mul_(squared).mul_(2)
    shifted = squared.mul_(y.square().addcmul_(x, x, value=-1)).add_(1)
    scale = shifted.square().addcmul_(turned, turned)
    torch.div(slope, scale, out=scale)
    real_part = torch.mul(x, shifted).addcmul_(y, turned, value=-1).mul_(scale)
    imaginary_part = y.mul_(shifted).addcmul_(x, turned).mul_(scale)
    return real_part, imaginary_part


class Tanh:
    """`tanh(u)`; poles at `+-i pi/2`."""

    max_slope = 1.0
    max_curvature = 4 / math.sqrt(27)
    needs_membrane = False

    def value(self, membrane: torch.Tensor) -> torch.Tensor:
        return torch.tanh(membrane)

    def constants(self, activity: torch.Tensor, membrane: torch.Tensor | None) -> Constants:
        return activity, 1 - activity.square()

    def slope(self, constants: Constants) -> torch.Tensor:
        return constants[1]

    def difference(self, constants: Constants, shift: torch.Tensor) -> torch.Tensor:
        tanh, slope = constants
        return tanh_difference(tanh, slope, shift)

    def complex_difference(
        self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tanh, slope = constants
        return complex_tanh_difference(tanh, slope, real, imaginary)

    def odd_difference(self, constants: Constants, shift: torch.Tensor) -> torch.Tensor:
        tanh, slope = constants
        return odd_tanh_difference(tanh, slope, shift)

    def odd_imaginary_difference(self, constants: Constants, imaginary: torch.Tensor) -> torch.Tensor:
        tanh, slope = constants
        return odd_imaginary_tanh_difference(tanh, slope, imaginary)

    def odd_complex_difference(
        self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tanh, slope = constants
        return odd_complex_tanh_difference(tanh, slope, real, imaginary)


class Sigmoid:
    """The paper's sigmoid `1 / (1 + exp(2 - 4u)) = (1 + tanh(2u - 1)) / 2`; poles at `1/2 +- i pi/4`."""

    max_slope = 1.0
    max_curvature = 8 / math.sqrt(27)
    needs_membrane = False

    def value(self, membrane: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(4 * membrane - 2)

    def constants(self, activity: torch.Tensor, membrane: torch.Tensor | None) -> Constants:
        return 2 * activity - 1, 4 * activity * (1 - activity)

    def slope(self, constants: Constants) -> torch.Tensor:
        return constants[1]

    def difference(self, constants: Constants, shift: torch.Tensor) -> torch.Tensor:
        tanh, slope = constants
        return 0.5 * tanh_difference(tanh, slope, 2 * shift)

    def complex_difference(
        self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tanh, slope = constants
        real_part, imaginary_part = complex_tanh_difference(tanh, slope, 2 * real, 2 * imaginary)
        return 0.5 * real_part, 0.5 * imaginary_part

    def odd_difference(self, constants: Constants, shift: torch.Tensor) -> torch.Tensor:
        tanh, slope = constants
        return odd_tanh_difference(tanh, slope, 2 * shift).mul_(0.5)

    def odd_imaginary_difference(self, constants: Constants, imaginary: torch.Tensor) -> torch.Tensor:
        tanh, slope = constants
        return odd_imaginary_tanh_difference(tanh, slope, 2 * imaginary).mul_(0.5)

    def odd_complex_difference(
        self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tanh, slope = constants
        real_part, imaginary_part = odd_complex_tanh_difference(tanh, slope, 2 * real, 2 * imaginary)
        return real_part.mul_(0.5), imaginary_part.mul_(0.5)


class DSiLU:
    """The paper's `(silu(u) - silu(u - 2)) / 2`, a smooth step from 0 to 1; poles at `+-i pi` and `2 +- i pi`."""

    max_slope = 0.5 * math.tanh(0.5) + 0.25 / math.cosh(0.5) ** 2
    max_curvature = 0.25
    needs_membrane = True

    def value(self, membrane: torch.Tensor) -> torch.Tensor:
        silu = torch.nn.functional.silu
        return 0.5 * (silu(membrane) - silu(membrane - 2))

    def constants(self, activity: torch.Tensor, membrane: torch.Tensor | None) -> Constants:
        assert membrane is not None
        lower, upper = torch.tanh(0.5 * membrane), torch.tanh(0.5 * membrane - 1)
        return lower, 1 - lower.square(), upper, 1 - upper.square(), membrane

    def slope(self, constants: Constants) -> torch.Tensor:
        lower, lower_slope, upper, upper_slope, membrane = constants
        return 0.25 * (lower - upper) + 0.125 * (membrane * lower_slope - (membrane - 2) * upper_slope)

    def difference(self, constants: Constants, shift: torch.Tensor) -> torch.Tensor:
        lower, lower_slope, upper, upper_slope, membrane = constants
        moved = membrane + shift
        lower_step = tanh_difference(lower, lower_slope, 0.5 * shift)
        upper_step = tanh_difference(upper, upper_slope, 0.5 * shift)
        return 0.25 * (shift * (lower - upper) + moved * lower_step - (moved - 2) * upper_step)

    def complex_difference(
        self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lower, lower_slope, upper, upper_slope, membrane = constants
        moved = membrane + real
        a, b = complex_tanh_difference(lower, lower_slope, 0.5 * real, 0.5 * imaginary)
        c, d = complex_tanh_difference(upper, upper_slope, 0.5 * real, 0.5 * imaginary)
        real_part = real * (lower - upper) + moved * a - imaginary * b - (moved - 2) * c + imaginary * d
        imaginary_part = imaginary * (lower - upper) + moved * b + imaginary * a - (moved - 2) * d - imaginary * c
        return 0.25 * real_part, 0.25 * imaginary_part

    def odd_difference(self, constants: Constants, shift: torch.Tensor) -> torch.Tensor:
        return (self.difference(constants, shift) - self.difference(constants, -shift)).mul_(0.5)

    def odd_imaginary_difference(self, constants: Constants, imaginary: torch.Tensor) -> torch.Tensor:
        return self.complex_difference(constants, torch.zeros_like(imaginary), imaginary)[1]

    def odd_complex_difference(
        self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ahead, ahead_imaginary = self.complex_difference(constants, real, imaginary)
        back, back_imaginary = self.complex_difference(constants, -real, -imaginary)
        return (ahead - back).mul_(0.5), (ahead_imaginary - back_imaginary).mul_(0.5)


ACTIVATIONS: dict[str, Activation] = {"tanh": Tanh(), "dsilu": DSiLU(), "sigmoid": Sigmoid()}


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
            drive (`torch.Tensor` of shape `(rows, n_layer)` or `(n_layer,)`, *optional*):
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

    def vector_field(self, membranes: list[torch.Tensor], drives: list[torch.Tensor]) -> list[torch.Tensor]:
        """`du/dt` of every layer: the paper's `F(theta, u, x)`, zero at a fixed point."""
        activities = [self.activation.value(membrane) for membrane in membranes]
        return [
            self.current(layer, list(activities), drive) - membrane
            for layer, (membrane, drive) in enumerate(zip(membranes, drives, strict=True))
        ]

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
