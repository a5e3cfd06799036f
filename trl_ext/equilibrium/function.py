"""The free fixed point as a differentiable function of drive and weights, without a graph through the relaxation.

Forward is [`free_relaxation`]. Backward takes the errors from [`error_vectors`] and ends in [`local_gradients`], which
tests/equilibrium/test_gradient.py holds equal to finite differences and to an unrolled relaxation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .activations import Activation
from .gradient import Estimator, error_vectors
from .network import LayeredNetwork
from .relaxation import Relaxation, free_relaxation


def local_gradients(
    errors: list[torch.Tensor], activities: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """
    Gradients that each connection has from its two ends:

        dL/d(bias_l) = e_l        dL/dWf_l = e_{l+1} r_l^T        dL/dWb_l = e_l r_{l+1}^T        summed over rows.

    Args:
        errors (`list[torch.Tensor]` of shapes `(rows, n_l)`):
            Error vectors `e_l = dL/d(drive_l)`.
        activities (`list[torch.Tensor]` of shapes `(rows, n_l)`):
            `r_l` at the free fixed point.

    Returns:
        `tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]`: of the biases of layers 2 to `L`, of
        forward and of backward weights.
    """
    pairs = range(len(errors) - 1)
    biases = [error.sum(dim=0) for error in errors[1:]]
    forward = [errors[layer + 1].T @ activities[layer] for layer in pairs]
    backward = [errors[layer].T @ activities[layer + 1] for layer in pairs]
    return biases, forward, backward


@dataclass
class RelaxationStatistics:
    """
    What the last free relaxation and the last one for a gradient did: their sweeps, and the largest change in the last
    checked one, of an activity or relative to a response's largest entry. The count is of rows since construction.
    """

    free_sweeps: int = 0
    free_residual: float = 0.0
    nudged_sweeps: int = 0
    nudged_residual: float = 0.0
    num_unconverged: int = 0


@dataclass
class Evaluation:
    """
    What one evaluation of [`equilibrium`] needs besides tensors. `warn_unconverged` gets the name of the phase and the
    number of rows that did not converge, `warn_failed` that of rows which oscillate or diverge, and which raise an
    error without it; `before_backward` is called before a gradient is estimated.
    """

    activation: Activation
    estimator: Estimator
    tolerance: float
    max_steps: int
    num_layers: int
    warn_unconverged: Callable[[str, int], None]
    before_backward: Callable[[], None] | None
    statistics: RelaxationStatistics = field(default_factory=RelaxationStatistics)
    warn_failed: Callable[[str, int], None] | None = None

    @property
    def raises(self) -> bool:
        return self.warn_failed is None

    def unpack(
        self, parameters: tuple[torch.Tensor, ...], dtype: torch.dtype
    ) -> tuple[list[torch.Tensor], LayeredNetwork]:
        """Biases and network in `dtype` from `L - 1` biases, forward weights and, if untied, backward weights."""
        count = self.num_layers - 1
        cast = [parameter.detach().to(dtype) for parameter in parameters]
        biases, forward, backward = cast[:count], cast[count : 2 * count], cast[2 * count :]
        return biases, LayeredNetwork(forward, backward or [weight.T for weight in forward], self.activation)

    def report(self, phase: str, relaxations: list[Relaxation]) -> None:
        sweeps = sum(relaxation.sweeps for relaxation in relaxations)
        residual = max((r.residuals.max().item() for r in relaxations if len(r.residuals)), default=0.0)
        unconverged = sum(relaxation.unconverged for relaxation in relaxations)
        setattr(self.statistics, f"{phase}_sweeps", sweeps)
        setattr(self.statistics, f"{phase}_residual", residual)
        failed = sum(int(r.failed.sum().item()) for r in relaxations if r.failed is not None)
        self.statistics.num_unconverged += max(unconverged, failed)
        if unconverged > failed:
            self.warn_unconverged(phase, unconverged - failed)
        if failed and self.warn_failed is not None:
            self.warn_failed(phase, failed)


class _Equilibrium(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, evaluation: Evaluation, drive: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        biases, network = evaluation.unpack(parameters, drive.dtype)
        relaxation = free_relaxation(
            network, drive, biases, evaluation.tolerance, evaluation.max_steps, evaluation.raises
        )
        evaluation.report("free", [relaxation])
        activities, membranes = relaxation.activities, []
        if evaluation.activation.needs_membrane:
            drives = [drive, *biases]
            membranes = [network.current(layer, list(activities), drives[layer]) for layer in range(len(activities))]
        ctx.evaluation, ctx.failed = evaluation, relaxation.failed
        # The parameters themselves, not their copies: engines that shard free and gather them in place
        ctx.save_for_backward(*parameters, *activities, *membranes)
        return activities[-1]

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        evaluation = ctx.evaluation
        if evaluation.before_backward is not None:
            evaluation.before_backward()
        with torch.no_grad(), torch.autocast(grad_output.device.type, enabled=False):
            moved = grad_output if ctx.failed is None else grad_output.masked_fill(ctx.failed.unsqueeze(1), 0.0)
            gradients = _gradients(evaluation, ctx.saved_tensors, moved, ctx.needs_input_grad[1:])
        if torch.is_grad_enabled():
            gradients = _RefuseDoubleBackward.apply(grad_output, *gradients)
        return None, *gradients


class _RefuseDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad_output: torch.Tensor, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "EPHead has no second derivative: its gradient is estimated by relaxations that keep no graph. Remove the "
            "term that differentiates the head's gradient (a gradient penalty, `create_graph=True`), or put it on a "
            "linear head."
        )


def _gradients(
    evaluation: Evaluation, saved: tuple[torch.Tensor, ...], grad_output: torch.Tensor, needed: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    num_layers = evaluation.num_layers
    parameters, states = saved[: len(saved) - num_layers], saved[len(saved) - num_layers :]
    membranes: tuple[torch.Tensor | None, ...] = (None,) * num_layers
    if evaluation.activation.needs_membrane:
        membranes = states
        parameters, states = parameters[:-num_layers], parameters[-num_layers:]
    activities = list(states)
    _, network = evaluation.unpack(parameters, grad_output.dtype)

    # Rows without a gradient, of padding or prompts, are not relaxed; the others get a nudge of unit norm
    size = grad_output.abs().amax(dim=-1, keepdim=True)
    finite = size.isfinite()
    rows = (finite & (size > 0)).squeeze(1).nonzero().squeeze(1)
    all_rows = len(rows) == len(grad_output)
    if not all_rows:
        activities = [activity[rows] for activity in activities]
        membranes = tuple(membrane if membrane is None else membrane[rows] for membrane in membranes)
    nudge = grad_output / size if all_rows else (grad_output / size)[rows]
    norm = torch.linalg.vector_norm(nudge, dim=-1, keepdim=True)
    constants = [
        evaluation.activation.constants(activity, membrane)
        for activity, membrane in zip(activities, membranes, strict=True)
    ]
    estimate = error_vectors(
        network, constants, nudge / norm, evaluation.estimator, evaluation.tolerance, evaluation.max_steps,
        evaluation.raises,
    )  # fmt: skip
    evaluation.report("nudged", estimate.relaxations)
    errors = [error.mul_(norm * size[rows]) for error in estimate.layers]

    drive_gradient = errors[0]
    if not all_rows:
        # A row whose gradient overflowed makes the result NaN, so that a loss scaler sees it
        drive_gradient = errors[0].new_zeros(len(grad_output), errors[0].shape[-1])
        drive_gradient.masked_fill_(~finite, torch.nan).index_copy_(0, rows, errors[0])
    biases, forward, backward = local_gradients(errors, activities)
    if len(parameters) == len(biases) + len(forward):
        # Feedback through the transposed forward weights: each has both gradients
        forward = [weight.add_(partner.T) for weight, partner in zip(forward, backward, strict=True)]
        backward = []
    weights = [*biases, *forward, *backward]
    if not all_rows and not finite.all():
        weights = [torch.full_like(weight, torch.nan) for weight in weights]
    cast = [weight.to(parameter.dtype) for weight, parameter in zip(weights, parameters, strict=True)]
    return tuple(gradient if need else None for gradient, need in zip([drive_gradient, *cast], needed, strict=True))


# How many sweeps are needed is known only from the values
@torch.compiler.disable
def equilibrium(evaluation: Evaluation, drive: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    """
    Activity `(rows, n_L)` of the last layer at the free fixed point under a drive `(rows, n_1)`, float32 or float64,
    whose dtype the relaxation has. `parameters` are, in any floating dtype, those of [`Evaluation.unpack`].
    """
    return _Equilibrium.apply(evaluation, drive, *parameters)
