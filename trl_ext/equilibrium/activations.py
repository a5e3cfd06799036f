"""Activations `phi` that are complex-differentiable, and differences of them that do not cancel.

    tanh(u + v) - tanh(u) = (1 - t^2) tanh(v) / (1 + t tanh(v))        with t = tanh(u)

the addition theorem, from which every difference below follows. The free relaxation runs `value`, the nudged ones the
differences; tests/equilibrium/test_network.py holds them equal to the formulas on complex numbers.
"""

import math

import torch


Constants = tuple[torch.Tensor, ...]
Pair = tuple[torch.Tensor, torch.Tensor]


class Activation:
    """
    A complex-differentiable activation `phi`.

    `difference` is `phi(u + v) - phi(u)` without the cancellation that subtraction would bring for small `v`, and
    `odd_difference` half of `phi(u + v) - phi(u - v)`. What they need of `u` comes from `constants`, which need `u`
    itself only where `needs_membrane` says so, else `phi(u)`. Complex values are pairs of real and imaginary part.
    """

    max_slope: float
    max_curvature: float
    needs_membrane = False

    def value(self, membrane: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def constants(self, activity: torch.Tensor, membrane: torch.Tensor | None) -> Constants:
        raise NotImplementedError

    def slope(self, constants: Constants) -> torch.Tensor:
        raise NotImplementedError

    def difference(self, constants: Constants, shift: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def complex_difference(self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor) -> Pair:
        raise NotImplementedError

    def odd_difference(self, constants: Constants, shift: torch.Tensor) -> torch.Tensor:
        return (self.difference(constants, shift) - self.difference(constants, -shift)).mul_(0.5)

    def odd_imaginary_difference(self, constants: Constants, imaginary: torch.Tensor) -> torch.Tensor:
        """Imaginary part for an imaginary `v`, where the real part is zero."""
        return self.complex_difference(constants, torch.zeros_like(imaginary), imaginary)[1]

    def odd_complex_difference(self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor) -> Pair:
        ahead, ahead_imaginary = self.complex_difference(constants, real, imaginary)
        back, back_imaginary = self.complex_difference(constants, -real, -imaginary)
        return (ahead - back).mul_(0.5), (ahead_imaginary - back_imaginary).mul_(0.5)


class Tanh(Activation):
    """`tanh(u)`; poles at `+-i pi/2`."""

    max_slope = 1.0
    max_curvature = 4 / math.sqrt(27)

    value = staticmethod(torch.tanh)  # type: ignore[assignment]  # No call of Python on the way

    def constants(self, activity: torch.Tensor, membrane: torch.Tensor | None) -> Constants:
        return activity, 1 - activity.square()

    def slope(self, constants: Constants) -> torch.Tensor:
        return constants[1]

    def difference(self, constants: Constants, shift: torch.Tensor) -> torch.Tensor:
        tanh, slope = constants
        moved = torch.tanh(shift)
        scale = torch.mul(tanh, moved).add_(1)
        return torch.div(slope, scale, out=scale).mul_(moved)

    def complex_difference(self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor) -> Pair:
        tanh, slope = constants
        p, q = torch.tanh(real), torch.tan(imaginary)
        shifted = torch.mul(tanh, p).add_(1)
        turned = torch.add(tanh, p).mul_(q)
        scale = shifted.square().addcmul_(turned, turned)
        torch.div(slope, scale, out=scale)
        real_part = torch.mul(p, shifted).addcmul_(q, turned).mul_(scale)
        imaginary_part = q.mul_(shifted).addcmul_(p, turned, value=-1).mul_(scale)
        return real_part, imaginary_part

    def odd_difference(self, constants: Constants, shift: torch.Tensor) -> torch.Tensor:
        tanh, slope = constants
        moved = torch.tanh(shift)
        scale = torch.mul(tanh, moved).square_().neg_().add_(1)
        return torch.div(slope, scale, out=scale).mul_(moved)

    def odd_imaginary_difference(self, constants: Constants, imaginary: torch.Tensor) -> torch.Tensor:
        tanh, slope = constants
        moved = torch.tan(imaginary)
        scale = torch.mul(tanh, moved).square_().add_(1)
        return torch.div(slope, scale, out=scale).mul_(moved)

    def odd_complex_difference(self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor) -> Pair:
        tanh, slope = constants
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


class Sigmoid(Tanh):
    """The paper's sigmoid `1 / (1 + exp(2 - 4u)) = (1 + tanh(2u - 1)) / 2`; poles at `1/2 +- i pi/4`."""

    max_slope = 1.0
    max_curvature = 8 / math.sqrt(27)

    def value(self, membrane: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.sigmoid(4 * membrane - 2)

    # Of the tanh at `2u - 1`: half its differences, for shifts twice as large
    def constants(self, activity: torch.Tensor, membrane: torch.Tensor | None) -> Constants:
        return 2 * activity - 1, 4 * activity * (1 - activity)

    def difference(self, constants: Constants, shift: torch.Tensor) -> torch.Tensor:
        return super().difference(constants, 2 * shift).mul_(0.5)

    def complex_difference(self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor) -> Pair:
        real_part, imaginary_part = super().complex_difference(constants, 2 * real, 2 * imaginary)
        return real_part.mul_(0.5), imaginary_part.mul_(0.5)

    def odd_difference(self, constants: Constants, shift: torch.Tensor) -> torch.Tensor:
        return super().odd_difference(constants, 2 * shift).mul_(0.5)

    def odd_imaginary_difference(self, constants: Constants, imaginary: torch.Tensor) -> torch.Tensor:
        return super().odd_imaginary_difference(constants, 2 * imaginary).mul_(0.5)

    def odd_complex_difference(self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor) -> Pair:
        real_part, imaginary_part = super().odd_complex_difference(constants, 2 * real, 2 * imaginary)
        return real_part.mul_(0.5), imaginary_part.mul_(0.5)


TANH = Tanh()


class DSiLU(Activation):
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
        lower_step = TANH.difference((lower, lower_slope), 0.5 * shift)
        upper_step = TANH.difference((upper, upper_slope), 0.5 * shift)
        return 0.25 * (shift * (lower - upper) + moved * lower_step - (moved - 2) * upper_step)

    def complex_difference(self, constants: Constants, real: torch.Tensor, imaginary: torch.Tensor) -> Pair:
        lower, lower_slope, upper, upper_slope, membrane = constants
        moved = membrane + real
        a, b = TANH.complex_difference((lower, lower_slope), 0.5 * real, 0.5 * imaginary)
        c, d = TANH.complex_difference((upper, upper_slope), 0.5 * real, 0.5 * imaginary)
        real_part = real * (lower - upper) + moved * a - imaginary * b - (moved - 2) * c + imaginary * d
        imaginary_part = imaginary * (lower - upper) + moved * b + imaginary * a - (moved - 2) * d - imaginary * c
        return 0.25 * real_part, 0.25 * imaginary_part


ACTIVATIONS: dict[str, Activation] = {"tanh": TANH, "dsilu": DSiLU(), "sigmoid": Sigmoid()}
