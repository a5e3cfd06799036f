"""The equilibrium-propagation head.

    drive = W_in h + b_in        r = fixed point of the network under drive        output = W_out r_L + b_out

One forward: [`EPHead.forward`] casts and maps the input, [`equilibrium`] (function.py) relaxes by [`relax`]
(relaxation.py) over [`LayeredNetwork.current`] (network.py), and the readout maps the last layer. One backward:
function.py, [`error_vectors`] (gradient.py), and the same [`relax`] on the differences of activations.py.
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from .activations import ACTIVATIONS
from .function import Evaluation, RelaxationStatistics, equilibrium
from .gradient import Estimator, layer_cosines
from .homeostasis import homeostasis_loss, symmetry_measure, weight_angle
from .network import LayeredNetwork
from .settings import (
    ActivationName,
    CorrectionName,
    EstimatorName,
    FeedbackName,
    HeadSettings,
    check_head,
    check_widths,
    head_settings,
)
from .spectral_cap import SUBSPACE_SIZE, cap_singular_values


if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


# Of fresh recurrent weights, with variance `(gain / chain)^2 / n`: the spectral norm of a large square one tends to
# `2 gain / chain`, and that of all layers together to 1, up to which every relaxation contracts
INITIAL_GAIN = 0.5


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
        spectral_cap: float | None = HeadSettings.spectral_cap,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.hidden_features = [hidden_features] if isinstance(hidden_features, int) else list(hidden_features)
        self.feedback, self.feedback_angle, self.activation = feedback, feedback_angle, activation
        self.estimator, self.num_points, self.rotated = estimator, num_points, rotated
        self.radius, self.correction = radius, correction
        self.tolerance, self.max_steps, self.spectral_cap = tolerance, max_steps, spectral_cap
        check_widths("in_features", in_features)
        check_widths("out_features", out_features)
        check_head(self)
        install_lm_head_guard()
        self.statistics = RelaxationStatistics()
        self._warned: set[str] = set()
        self._uses_homeostasis = False
        # All are parameters of this module itself: ZeRO-3 gathers a module's own parameters around its forward
        for name, values in self.initial_parameters().items():
            if name.endswith("_subspace"):
                self.register_buffer(name, torch.empty(values.shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(values.shape)))
            getattr(self, name).detach().copy_(values)

    def settings(self) -> dict[str, Any]:
        """Arguments that build a head of the same kind, as JSON can hold them."""
        return {"in_features": self.in_features, "out_features": self.out_features, **head_settings(self)}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """
        Draws fresh weights: normal, of variance `1 / fan_in` for the linear maps and, for the recurrent weights, of a
        gain that makes the network contract at any depth; feedback at `feedback_angle`; biases zero.

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
        # Spectral norm of a chain of equal weights over that of one: the largest eigenvalue of a path of `L` nodes
        chain = 2 * math.cos(math.pi / (len(widths) + 1)) if len(widths) > 1 else 1.0

        def draw(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator, device="cpu") * (gain / math.sqrt(columns))

        values = {"input_weight": draw(widths[0], self.in_features), "input_bias": torch.zeros(widths[0])}
        for layer, (below, above) in enumerate(itertools.pairwise(widths), start=1):
            forward = draw(above, below, INITIAL_GAIN / chain)
            values[f"forward_weight_{layer}"] = forward
            if self.feedback == "asymmetric":
                values[f"backward_weight_{layer}"] = at_angle(forward.T, self.feedback_angle, generator)
            values[f"bias_{layer + 1}"] = torch.zeros(above)
        recurrent = [name for name in values if name.startswith(("forward_weight", "backward_weight"))]
        capped = [] if self.spectral_cap is None else recurrent
        for name in capped:
            left, singular, right = torch.linalg.svd(values[name], full_matrices=False)
            values[name] = (left * singular.clamp_max(self.spectral_cap)) @ right
        values["readout_weight"] = draw(self.out_features, widths[-1])
        values["readout_bias"] = torch.zeros(self.out_features)
        for name in capped:
            size = min(SUBSPACE_SIZE, *values[name].shape)
            values[f"{name}_subspace"] = torch.randn(values[name].shape[1], size, generator=generator, device="cpu")
        return values

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
        if self.spectral_cap is None:
            return forward, backward
        for name, weights in (("forward_weight", forward), ("backward_weight", backward)):
            for layer, weight in enumerate(weights, start=1):
                subspace = getattr(self, f"{name}_{layer}_subspace")
                weights[layer - 1], right = cap_singular_values(weight.to(dtype), subspace, self.spectral_cap)
                if self.training:
                    subspace.copy_(right)
        return forward, backward

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
            EquilibriumError: If a relaxation oscillates or diverges.
        """
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
            rows = hidden.reshape(-1, self.in_features).to(dtype)
            drive = nn.functional.linear(rows, self.input_weight.to(dtype), self.input_bias.to(dtype))
            self._check_finite(hidden, drive)
            biases, _, _ = self.recurrent_parameters()
            forward_weights, backward_weights = self._recurrent_weights(dtype)
            evaluation = self._evaluation(trains_backbone=torch.is_grad_enabled() and hidden.requires_grad)
            top = equilibrium(evaluation, drive, *biases, *forward_weights, *backward_weights)
            output = nn.functional.linear(top, self.readout_weight.to(dtype), self.readout_bias.to(dtype))
        self._watch_weights(output, reaches_input=hidden.requires_grad)
        return output.to(hidden.dtype).view(*hidden.shape[:-1], self.out_features)

    def _evaluation(self, trains_backbone: bool) -> Evaluation:
        return Evaluation(
            activation=ACTIVATIONS[self.activation],
            estimator=Estimator(self.estimator, self.num_points, self.rotated, self.radius, self.correction),
            tolerance=self.tolerance,
            max_steps=self.max_steps,
            num_layers=len(self.hidden_features),
            warn_unconverged=self._warn_unconverged,
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
        # What the backward pass reads itself, and not as a copy: of a lower precision, or capped
        unread = {"input_bias", "readout_bias"} | (set() if reaches_input else {"input_weight"})
        if self.spectral_cap is not None:
            unread |= {name for name, _ in self.named_parameters() if name.startswith(("forward_", "backward_"))}
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
            "`statistics.num_unconverged`. Raise `max_steps`, or set `spectral_cap` for faster relaxation.",
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
        rows = hidden.reshape(-1, self.in_features).to(dtype)
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
        from .relaxation_plot import draw_relaxation, residual_curve

        dtype = torch.float64 if torch.float64 in (hidden.dtype, self.input_weight.dtype) else torch.float32
        evaluation = self._evaluation(trains_backbone=False)
        parameters, _, _ = self.recurrent_parameters()
        forward, backward = self._recurrent_weights(dtype)
        biases, network = evaluation.unpack((*parameters, *forward, *backward), dtype)
        rows = hidden.reshape(-1, self.in_features).to(dtype)
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


def at_angle(weight: torch.Tensor, degrees: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """A random matrix of the shape and norm of `weight`, at an angle to it as vectors."""
    noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype, device=weight.device)
    noise -= weight * ((noise * weight).sum() / weight.square().sum())
    noise *= weight.norm() / noise.norm()
    angle = math.radians(degrees)
    return math.cos(angle) * weight + math.sin(angle) * noise


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
