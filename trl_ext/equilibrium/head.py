"""The equilibrium-propagation head.

    drive = W_in h + b_in        r = fixed point of the network under drive        output = W_out r_L + b_out

One forward: [`EPHead.forward`] casts and maps the input, [`equilibrium`] (function.py) relaxes by [`relax`]
(relaxation.py) over [`LayeredNetwork.current`] (network.py), and the readout maps the last layer. One backward:
function.py, [`error_vectors`] (gradient.py), and the same [`relax`] on the differences of activations.py.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from .activations import ACTIVATIONS
from .function import Evaluation, RelaxationStatistics, equilibrium
from .gradient import Estimator, layer_cosines
from .homeostasis import homeostasis_loss, symmetry_measure, weight_angle
from .input_norm import InputNormName, normalize, update_statistics
from .network import LayeredNetwork, cap_singular_values, contraction_bound
from .relaxation import fixed_sweeps, residual_curve
from .settings import (
    AUTO,
    ActivationName,
    CorrectionName,
    EstimatorName,
    FeedbackName,
    HeadSettings,
    OscillationName,
    SpectralCap,
    as_widths,
    check_head,
    check_widths,
    head_settings,
)


if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


# Shares of the contraction bound: of the singular values of fresh recurrent weights, which are all equal, and of the
# cap. The nearer to 1, the less of a signal is lost from layer to layer and the more sweeps it takes
INITIAL_SHARE = 0.95
CAP_SHARE = 0.98


class EPHead(nn.Module):
    """
    Head that relaxes a layered recurrent network to a fixed point and learns by equilibrium propagation.

    The input enters the first layer as a static current, through a linear map; the last layer is read out by another.
    The free fixed point is the output's; the gradient is estimated from fixed points nudged by the incoming gradient
    ([Laborieux and Zenke, 2024](https://huggingface.co/papers/2309.02214)), of which no graph is kept. Any loss works
    above it and any backbone below.

    Relaxation is in float32, or in float64 if the input or the parameters are, whatever the model's dtype and
    autocast. All parameters are the module's own and are used in its forward only.

    Args:
        in_features (`int`):
            Size of the input.
        hidden_features (`int` or `list[int]`):
            Widths of the layers; see [`HeadSettings`].
        out_features (`int`):
            Size of the output.
        feedback, feedback_angle, activation, estimator, num_points, rotated (*optional*):
            See [`HeadSettings`].
        radius, correction, tolerance, max_steps, spectral_cap (*optional*):
            See [`HeadSettings`].
        input_norm, on_oscillation (*optional*):
            See [`HeadSettings`].

    Attributes:
        statistics ([`RelaxationStatistics`]):
            Sweeps and residuals of the last relaxations, and the count of rows that did not converge.

    Raises:
        ValueError: If an argument is not one of those above.

    Example:

    ```python
    >>> import torch
    >>> from trl_ext import EPHead

    >>> head = EPHead(64, [256, 256], 1)
    >>> rewards = head(torch.randn(8, 64))
    >>> rewards.sum().backward()
    >>> head.metrics()
    ```
    """

    input_weight: nn.Parameter
    input_bias: nn.Parameter
    readout_weight: nn.Parameter
    readout_bias: nn.Parameter
    input_norm_mean: torch.Tensor
    input_norm_batches: torch.Tensor

    def __init__(
        self,
        in_features: int,
        hidden_features: int | Sequence[int],
        out_features: int,
        *,
        feedback: FeedbackName = HeadSettings.feedback,
        feedback_angle: float = HeadSettings.feedback_angle,
        activation: ActivationName = HeadSettings.activation,
        estimator: EstimatorName = HeadSettings.estimator,
        num_points: int = HeadSettings.num_points,
        rotated: bool = HeadSettings.rotated,
        radius: float = HeadSettings.radius,
        correction: CorrectionName = HeadSettings.correction,
        tolerance: float = HeadSettings.tolerance,
        max_steps: int = HeadSettings.max_steps,
        spectral_cap: SpectralCap = HeadSettings.spectral_cap,
        input_norm: InputNormName = HeadSettings.input_norm,
        on_oscillation: OscillationName = HeadSettings.on_oscillation,
    ):
        super().__init__()
        check_widths("in_features", in_features)
        check_widths("out_features", out_features)
        check_widths("hidden_features", hidden_features)
        self.in_features, self.out_features = int(in_features), int(out_features)
        self.hidden_features = as_widths(hidden_features)
        self.feedback, self.feedback_angle, self.activation = feedback, feedback_angle, activation
        self.estimator, self.num_points, self.rotated = estimator, num_points, rotated
        self.radius, self.correction = radius, correction
        self.tolerance, self.max_steps, self.spectral_cap = tolerance, max_steps, spectral_cap
        self.input_norm, self.on_oscillation = input_norm, on_oscillation
        check_head(self)
        install_lm_head_guard()
        self.statistics = RelaxationStatistics()
        self._warned: set[str] = set()
        self._uses_homeostasis = False
        self._fixed_forward: Callable[[torch.Tensor], torch.Tensor] | None = None
        # In float32 where a model is built in half precision. All are parameters of this module itself: ZeRO-3 gathers
        # a module's own parameters around its forward
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        for name, values in self.initial_parameters().items():
            empty = torch.empty(values.shape, dtype=dtype if values.is_floating_point() else values.dtype)
            if name.startswith("input_norm_"):
                self.register_buffer(name, empty)
            else:
                self.register_parameter(name, nn.Parameter(empty))
            getattr(self, name).detach().copy_(values)

    def settings(self) -> dict[str, Any]:
        """Arguments that build a head of the same kind, as JSON can hold them."""
        return {"in_features": self.in_features, "out_features": self.out_features, **head_settings(self)}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """
        Draws fresh weights: normal, of variance `1 / fan_in` for the linear maps; recurrent weights orthogonal, all
        their singular values at 0.95 of [`contraction_bound`], so that the network contracts at any depth and width
        with the least loss from layer to layer; feedback at `feedback_angle` ([`at_angle`]); biases zero.

        Args:
            generator (`torch.Generator`, *optional*):
                Source of the random numbers.
        """
        for name, values in self.initial_parameters(generator).items():
            getattr(self, name).copy_(values)

    def initial_parameters(self, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """
        Fresh values of all parameters and buffers, on the CPU in float32; see [`~EPHead.reset_parameters`].

        Args:
            generator (`torch.Generator`, *optional*):
                Source of the random numbers.

        Returns:
            `dict[str, torch.Tensor]`: by their names.
        """
        widths = self.hidden_features

        def draw(rows: int, columns: int) -> torch.Tensor:
            normal = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
            return normal / math.sqrt(columns)

        values = {"input_weight": draw(widths[0], self.in_features), "input_bias": zeros(widths[0])}
        gain = INITIAL_SHARE * contraction_bound(len(widths), ACTIVATIONS[self.activation])
        cap = self.cap()
        gain = gain if cap is None else min(gain, cap)
        for layer, (below, above) in enumerate(itertools.pairwise(widths), start=1):
            forward = orthogonal(above, below, generator).mul_(gain)
            values[f"forward_weight_{layer}"] = forward
            if self.feedback == "asymmetric":
                values[f"backward_weight_{layer}"] = at_angle(forward.T, self.feedback_angle, generator)
            values[f"bias_{layer + 1}"] = zeros(above)
        values["readout_weight"] = draw(self.out_features, widths[-1])
        values["readout_bias"] = zeros(self.out_features)
        if self.input_norm != "none":
            values["input_norm_mean"] = zeros(self.in_features)
            values["input_norm_batches"] = torch.zeros((), dtype=torch.int64, device="cpu")
        if self.input_norm == "standardize":
            values["input_norm_variance"] = zeros(self.in_features) + 1
        return values

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Heads had a subspace for each capped weight, which the cap no longer needs
        for name in [name for name in state_dict if name.startswith(prefix) and name.endswith("_subspace")]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def cap(self) -> float | None:
        """The number that `spectral_cap` stands for; `None` without a bound, or without recurrent weights."""
        if self.spectral_cap is None or len(self.hidden_features) == 1:
            return None
        if self.spectral_cap != AUTO:
            return float(self.spectral_cap)
        return CAP_SHARE * contraction_bound(len(self.hidden_features), ACTIVATIONS[self.activation])

    def recurrent_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        """Biases of layers 2 to `L`, forward weights, and backward weights, which symmetric feedback has none of."""
        layers = range(1, len(self.hidden_features))
        biases = [getattr(self, f"bias_{layer + 1}") for layer in layers]
        forward = [getattr(self, f"forward_weight_{layer}") for layer in layers]
        backward = [getattr(self, f"backward_weight_{layer}") for layer in layers if self.feedback == "asymmetric"]
        return biases, forward, backward

    def _recurrent_weights(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Forward and backward weights, capped in `dtype` if there is a cap; the parameters themselves if not."""
        forward, backward = (list[torch.Tensor](weights) for weights in self.recurrent_parameters()[1:])
        cap = self.cap()
        if cap is None:
            return forward, backward
        return [cap_singular_values(weight.to(dtype), cap) for weight in forward], [
            cap_singular_values(weight.to(dtype), cap) for weight in backward
        ]

    def forward(self, hidden: torch.Tensor | None, homeostasis: dict[str, Any] | None = None) -> torch.Tensor:
        """
        Args:
            hidden (`torch.Tensor` of shape `(..., in_features)`, any floating dtype):
                Input. Rows that no gradient reaches cost nothing in the backward pass.
            homeostasis (`dict`, *optional*):
                Used by [`~EPHead.homeostasis_loss`], which passes through here so that engines gather the weights.

        Returns:
            `torch.Tensor` of shape `(..., out_features)` in the dtype of `hidden`.

        Raises:
            ValueError: If `hidden` has another size, no floating dtype, or a row that is not finite.
            RuntimeError: If it is traced, exported or transformed by `torch.func` outside [`~EPHead.fixed_steps`].
            EquilibriumError: If a relaxation oscillates or diverges.
        """
        if self._fixed_forward is not None and hidden is not None:
            return self._fixed_forward(hidden)
        _refuse_tracing()
        if homeostasis is not None:
            with torch.autocast(self.input_weight.device.type, enabled=False):
                dtype = torch.promote_types(self.input_weight.dtype, torch.float32)
                forward, backward = self._recurrent_weights(dtype)
                return homeostasis_loss(forward, backward or [weight.T for weight in forward], **homeostasis)
        assert hidden is not None
        if hidden.shape[-1] != self.in_features or not hidden.is_floating_point():
            raise ValueError(
                f"EPHead needs a floating input of last size `in_features` = {self.in_features}, got {hidden.dtype} "
                f"of shape {tuple(hidden.shape)}."
            )
        is_double = torch.float64 in (hidden.dtype, self.input_weight.dtype)
        dtype = torch.float64 if is_double else torch.float32
        with torch.autocast(hidden.device.type, enabled=False):
            rows = self._normalized(hidden.reshape(-1, self.in_features).to(dtype), updates=torch.is_grad_enabled())
            drive = nn.functional.linear(rows, self.input_weight.to(dtype), self.input_bias.to(dtype))
            self._check_finite(hidden, drive)
            biases, _, _ = self.recurrent_parameters()
            forward_weights, backward_weights = self._recurrent_weights(dtype)
            evaluation = self._evaluation(trains_backbone=torch.is_grad_enabled() and hidden.requires_grad)
            top = equilibrium(evaluation, drive, *biases, *forward_weights, *backward_weights)
            output = nn.functional.linear(top, self.readout_weight.to(dtype), self.readout_bias.to(dtype))
        self._watch_weights(output, reaches_input=hidden.requires_grad)
        return output.to(hidden.dtype).view(*hidden.shape[:-1], self.out_features)

    def _normalized(self, rows: torch.Tensor, updates: bool) -> torch.Tensor:
        """The input under `input_norm`; in training its statistics first take in these rows, if they are finite."""
        if self.input_norm == "none":
            return rows
        variance = getattr(self, "input_norm_variance", None)
        if self.training and updates and rows.isfinite().all():
            update_statistics(self.input_norm_mean, variance, self.input_norm_batches, rows.detach())
        return normalize(rows, self.input_norm_mean, variance)

    @contextmanager
    def fixed_steps(self, num_steps: int) -> Iterator[None]:
        """
        While it is open, a forward makes so many sweeps, whatever its rows: no step of it depends on values, so
        `torch.export`, `torch.onnx.export`, `torch.jit.trace` and `torch.vmap` take it. For inference only: outputs
        have no gradient, weights are capped once, when it opens, and nothing is checked or counted.

        Args:
            num_steps (`int`):
                Sweeps. [`~EPHead.metrics`] says how many the rows of a batch needed, as `ep/free_sweeps`.

        Raises:
            ValueError: If `num_steps` is no positive integer.
            RuntimeError: If the head is in training mode.

        Example:

        ```python
        >>> head = EPHead(64, [256, 256], 1).eval()
        >>> with head.fixed_steps(30):
        ...     program = torch.export.export(head, (torch.randn(8, 64),))
        ```
        """
        check_widths("num_steps", num_steps)
        if self.training:
            raise RuntimeError(
                "`fixed_steps` gives no gradient, and the head is in training mode. Call `eval()` first."
            )
        double = self.input_weight.dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        with torch.no_grad():
            forward, backward = self._recurrent_weights(dtype)

        def fixed_forward(hidden: torch.Tensor) -> torch.Tensor:
            rows = self._normalized(hidden.reshape(-1, self.in_features).to(dtype), updates=False)
            drive = nn.functional.linear(rows, self.input_weight.to(dtype), self.input_bias.to(dtype))
            biases = [bias.to(dtype) for bias in self.recurrent_parameters()[0]]
            weights = [weight.to(dtype) for weight in forward]
            partners = [weight.to(dtype) for weight in backward] or [weight.T for weight in weights]
            network = LayeredNetwork(weights, partners, ACTIVATIONS[self.activation])
            top = fixed_sweeps(network, [drive, *biases], int(num_steps))
            output = nn.functional.linear(top, self.readout_weight.to(dtype), self.readout_bias.to(dtype))
            return output.to(hidden.dtype).view(*hidden.shape[:-1], self.out_features).detach()

        self._fixed_forward = fixed_forward
        try:
            yield
        finally:
            self._fixed_forward = None

    def _evaluation(self, trains_backbone: bool) -> Evaluation:
        return Evaluation(
            activation=ACTIVATIONS[self.activation],
            estimator=Estimator(self.estimator, self.num_points, self.rotated, self.radius, self.correction),
            tolerance=self.tolerance,
            max_steps=self.max_steps,
            num_layers=len(self.hidden_features),
            warn_unconverged=self._warn_unconverged,
            warn_failed=self._warn_failed if self.on_oscillation == "warn" else None,
            before_backward=self._warn_bias if trains_backbone else None,
            statistics=self.statistics,
        )

    def _check_finite(self, hidden: torch.Tensor, drive: torch.Tensor) -> None:
        bad = ~drive.detach().sum(dim=-1).isfinite()
        if not bad.any():
            return
        bad_inputs = ~hidden.detach().isfinite().all(dim=-1)
        if not bad_inputs.any():
            raise ValueError("`input_weight` or `input_bias` of EPHead is not finite, or overflows with this input.")
        rows = [tuple(row) if len(row) > 1 else row[0] for row in bad_inputs.nonzero().tolist()]
        raise ValueError(
            f"The input of EPHead is not finite in {len(rows)} row(s), the first at index {rows[0]} of a batch of "
            f"shape {tuple(hidden.shape[:-1])}. Look for the overflow in the model below."
        )

    def _watch_weights(self, output: torch.Tensor, reaches_input: bool) -> None:
        """Names the remedy where a weight is changed before the backward pass; torch names a shape and a version."""
        if not output.requires_grad or torch.compiler.is_compiling():
            return
        # What the backward pass reads itself, and not as a copy of a lower precision
        unread = {"input_bias", "readout_bias"} | (set() if reaches_input else {"input_weight"})
        parameters = [(name, weight) for name, weight in self.named_parameters() if name not in unread]
        read = {name: weight for name, weight in parameters if weight.dtype == output.dtype}
        versions = {name: weight._version for name, weight in read.items()}

        def check(_: torch.Tensor) -> None:
            changed = [name for name, weight in read.items() if weight._version != versions[name]]
            if changed:
                raise RuntimeError(
                    f"`{changed[0]}` of EPHead was changed between forward and backward, so the gradient would be "
                    "that of other weights. Step the optimizer, clip or load weights after the backward pass, or call "
                    "the head again before it."
                )

        output.register_hook(check)

    def _warn_once(self, name: str, message: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(message, stacklevel=4)

    def _warn_unconverged(self, phase: str, count: int) -> None:
        self._warn_once(
            "unconverged",
            f"EPHead: {count} row(s) did not converge within `max_steps` = {self.max_steps} sweeps of the {phase} "
            f"relaxation (tolerance {self.tolerance}), though they come closer. Further ones are counted in "
            "`statistics.num_unconverged`. Raise `max_steps`, or set a smaller `spectral_cap` for faster relaxation.",
        )

    def _warn_failed(self, phase: str, count: int) -> None:
        self._warn_once(
            "failed",
            f"EPHead: {count} row(s) oscillate or diverge in the {phase} relaxation. Their outputs are those of the "
            "last sweep, and they have no part in the gradient. Further ones are counted in "
            "`statistics.num_unconverged`. Set `spectral_cap='auto'`, with which none can.",
        )

    def _warn_bias(self) -> None:
        is_exact = self.feedback == "symmetric" or self.correction == "asymep" or self.estimator == "exact"
        if not is_exact and not self._uses_homeostasis:
            self._warn_once(
                "bias",
                "EPHead trains the backbone through asymmetric feedback without `homeostasis_loss` or "
                "`correction='asymep'`: the gradient it hands down is biased by the asymmetry of the weights, and at "
                "90 degrees hardly correlates with the true one. Add one of the two, or detach the backbone.",
            )

    def homeostasis_loss(
        self, num_probes: int | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """
        The Jacobian homeostasis objective, which makes feedback symmetric; see [`homeostasis.homeostasis_loss`].

        Under ZeRO-3 and FSDP2 it must be called within the forward of the engine's module.

        Args:
            num_probes (`int`, *optional*):
                Random probes to estimate it with, as the paper does. By default its closed form is computed.
            generator (`torch.Generator`, *optional*):
                Source of the probes.

        Returns:
            `torch.Tensor`: scalar in float32 or float64, zero for symmetric feedback.
        """
        self._uses_homeostasis = True
        return self(None, homeostasis={"num_probes": num_probes, "generator": generator})

    @torch.no_grad()
    def alignment(self, hidden: torch.Tensor, output_gradient: torch.Tensor | None = None) -> list[float]:
        """
        How well the estimator's error vectors point in the direction of the exact ones. Reads the weights directly:
        gather them first under ZeRO-3 and FSDP.

        Args:
            hidden (`torch.Tensor` of shape `(..., in_features)`):
                Input.
            output_gradient (`torch.Tensor` of shape `(..., out_features)`, *optional*):
                Gradient of the loss at the output; by default that of the sum of the outputs.

        Returns:
            `list[float]`: for each layer, the cosine of estimated and exact error vector, averaged over the rows that
            have a gradient; 1 for an exact estimate.
        """
        dtype = torch.float64 if torch.float64 in (hidden.dtype, self.input_weight.dtype) else torch.float32
        rows = self._normalized(hidden.reshape(-1, self.in_features).to(dtype), updates=False)
        evaluation = self._evaluation(trains_backbone=False)
        parameters, _, _ = self.recurrent_parameters()
        forward, backward = self._recurrent_weights(dtype)
        biases, network = evaluation.unpack((*parameters, *forward, *backward), dtype)
        drive = nn.functional.linear(rows, self.input_weight.to(dtype), self.input_bias.to(dtype))
        if output_gradient is None:
            output_gradient = torch.ones(len(rows), self.out_features, dtype=dtype, device=rows.device)
        gradient = output_gradient.reshape(-1, self.out_features).to(dtype) @ self.readout_weight.to(dtype)
        return layer_cosines(network, drive, biases, gradient, evaluation.estimator, self.tolerance, self.max_steps)

    @torch.no_grad()
    def plot(self, hidden: torch.Tensor, path: "str | Path | None" = None, num_sweeps: int | None = None) -> "Figure":
        """
        Draws how an input relaxes: the largest change of an activity against sweeps, of the median row and the slowest
        one. Needs matplotlib, and reads the weights directly: gather them first under ZeRO-3 and FSDP.

        Args:
            hidden (`torch.Tensor` of shape `(..., in_features)`):
                Input.
            path (`str` or `Path`, *optional*):
                PNG to write.
            num_sweeps (`int`, *optional*):
                Sweeps to draw. Defaults to `max_steps`.

        Returns:
            `matplotlib.figure.Figure`
        """
        from .relaxation_plot import draw_relaxation

        dtype = torch.float64 if torch.float64 in (hidden.dtype, self.input_weight.dtype) else torch.float32
        evaluation = self._evaluation(trains_backbone=False)
        parameters, _, _ = self.recurrent_parameters()
        forward, backward = self._recurrent_weights(dtype)
        biases, network = evaluation.unpack((*parameters, *forward, *backward), dtype)
        rows = self._normalized(hidden.reshape(-1, self.in_features).to(dtype), updates=False)
        drive = nn.functional.linear(rows, self.input_weight.to(dtype), self.input_bias.to(dtype))
        residuals = residual_curve(network, drive, biases, num_sweeps or self.max_steps)
        return draw_relaxation(residuals, self.tolerance, path)

    @torch.no_grad()
    def asymmetry(self) -> dict[str, float]:
        """
        Measures of the asymmetry of the weights, to log. Reads the weights directly: gather them first under ZeRO-3
        and FSDP.

        Returns:
            `dict[str, float]`: `"ep/symmetry"`, the paper's `|S| / (|S| + |A|)` (1 is symmetric), and
            `"ep/weight_angle"`, the mean angle in degrees between forward weights and transposed feedback weights.
        """
        _, forward, backward = self.recurrent_parameters()
        if not forward:
            return {"ep/symmetry": 1.0, "ep/weight_angle": 0.0}
        partners = [weight.float() for weight in backward] or [weight.T.float() for weight in forward]
        weights = [weight.float() for weight in forward]
        network = LayeredNetwork(weights, partners, ACTIVATIONS[self.activation])
        angles = [weight_angle(weight, partner) for weight, partner in zip(weights, partners, strict=True)]
        return {
            "ep/symmetry": symmetry_measure(network.weight_matrix()),
            "ep/weight_angle": sum(angles) / len(angles),
        }

    def metrics(self) -> dict[str, float]:
        """The [`RelaxationStatistics`] under the names to log: `ep/free_sweeps` and so on."""
        return {f"ep/{name}": float(value) for name, value in vars(self.statistics).items()}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, hidden_features={self.hidden_features}, out_features="
            f"{self.out_features}, feedback={self.feedback}, activation={self.activation}, estimator={self.estimator}"
        )


def zeros(size: int) -> torch.Tensor:
    """A vector of zeros on the CPU, in float32 whatever torch's default."""
    return torch.zeros(size, dtype=torch.float32, device="cpu")


def orthogonal(rows: int, columns: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    A random matrix on the CPU, in float32, whose singular values are all 1: that of `nn.init.orthogonal_`, which
    transformers switches off while it loads a model under ZeRO-3.
    """
    normal = torch.empty(rows, columns, dtype=torch.float32, device="cpu").normal_(generator=generator).float()
    basis, triangle = torch.linalg.qr(normal.T if rows < columns else normal)
    basis = basis * triangle.diagonal().sign()
    return (basis.T if rows < columns else basis).contiguous()


def at_angle(weight: torch.Tensor, degrees: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    A random matrix at an angle to another, as vectors: `cos(a) W + sin(a) N` with an orthogonal `N`, at 90 degrees to
    the weight and of its norm.

    Args:
        weight (`torch.Tensor` of shape `(m, n)`, float32):
            `W`, on the CPU.
        degrees (`float`):
            Angle `a`.
        generator (`torch.Generator`, *optional*):
            Source of `N`.

    Returns:
        `torch.Tensor` of shape `(m, n)`, scaled down where its spectral norm would be greater than that of `W`.

    Raises:
        ValueError: If there is no such matrix, since the weight has a single entry.
    """
    angle = math.radians(degrees)
    if math.sin(angle) < 1e-12:
        return math.cos(angle) * weight
    if weight.numel() == 1:
        raise ValueError(
            f"`feedback_angle` is {degrees} between two layers of one unit, whose weight is a single number and can "
            "be at 0 or 180 degrees only. Give a layer more units."
        )
    noise = orthogonal(weight.shape[0], weight.shape[1], generator)
    noise -= weight * ((noise * weight).sum() / weight.square().sum())
    noise *= weight.norm() / noise.norm()
    mixed = math.cos(angle) * weight + math.sin(angle) * noise
    size, norm = (torch.linalg.matrix_norm(matrix, ord=2) for matrix in (weight, mixed))
    return mixed * (size / norm).clamp_max(1.0)


def _refuse_tracing() -> None:
    """Refuses what records operations once for all inputs: how many sweeps there are depends on the values."""
    kinds = {
        "torch.jit.trace": torch.jit.is_tracing,
        "torch.export": torch.compiler.is_exporting,
        "torch.func (vmap, grad, jvp)": torch._C._are_functorch_transforms_active,  # what autograd.Function asks
    }
    for kind, is_active in kinds.items():
        if is_active():
            raise RuntimeError(
                f"EPHead relaxes until its rows have converged, which {kind} cannot record. For inference open "
                "`with head.fixed_steps(n):` around it, with `head = model.score` for a classifier; for gradients of "
                "single rows call the head on each."
            )


_lm_head_guard: RemovableHandle | None = None


def install_lm_head_guard() -> None:
    """
    Calls [`refuse_behind_lm_head`] for every module that any module of this process gets from now on. The first
    [`EPHead`] that is built does this; a second call changes nothing.
    """
    global _lm_head_guard
    if _lm_head_guard is None:
        _lm_head_guard = register_module_module_registration_hook(refuse_behind_lm_head)


def remove_lm_head_guard() -> None:
    """Undoes [`install_lm_head_guard`], until another [`EPHead`] is built."""
    global _lm_head_guard
    if _lm_head_guard is not None:
        _lm_head_guard.remove()
        _lm_head_guard = None


def refuse_behind_lm_head(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Refuses output embeddings of a model of transformers that are an [`EPHead`], or contain one."""
    if submodule is None or not hasattr(type(module), "get_output_embeddings"):
        return
    if name != "lm_head" and not _is_output_embeddings(module, name):
        return
    if any(isinstance(part, EPHead) for part in submodule.modules()):
        raise ValueError(
            f"An `EPHead` must not stand in `{name}`, where the output embeddings are: TRL's trainers read the weight "
            "of that module and never call it, so the head would be bypassed without a word. Put it before the output "
            "embeddings, or use it as `EPModelForSequenceClassification`, or as critic of `ConstrainedPPOTrainer` "
            "(`critic_head='equilibrium'`)."
        )


def _is_output_embeddings(module: Any, name: str) -> bool:
    current = getattr(module, name, None)
    return current is not None and current is module.get_output_embeddings()
