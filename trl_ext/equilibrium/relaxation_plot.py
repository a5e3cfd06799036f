"""How fast the head relaxes, sweep by sweep, as numbers and as a picture.

[`relax`] measures the change of a sweep now and then, and stops; here every sweep of every row is measured.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.figures import COLORS, new_axes, save_figure
from .network import LayeredNetwork


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def residual_curve(
    network: LayeredNetwork, drive: torch.Tensor, biases: list[torch.Tensor], num_sweeps: int
) -> torch.Tensor:
    """
    Largest change of an activity in each sweep of the free relaxation, for each row.

    Args:
        network ([`LayeredNetwork`]):
            Weights and activation.
        drive (`torch.Tensor` of shape `(rows, n_1)`):
            Constant current of the first layer.
        biases (`list[torch.Tensor]` of shapes `(n_l,)`):
            Those of the layers above.
        num_sweeps (`int`):
            Sweeps after the first pass through the layers.

    Returns:
        `torch.Tensor` of shape `(num_sweeps, rows)`.
    """
    drives, layers = [drive, *biases], range(network.num_layers)
    state: list[torch.Tensor | None] = [None] * network.num_layers
    for layer in layers:
        state[layer] = network.activation.value(network.current(layer, state, drives[layer]))
    residuals = drive.new_zeros(num_sweeps, len(drive))
    for sweep in range(num_sweeps):
        for layer in (*layers[::2], *layers[1::2]):
            new = network.activation.value(network.current(layer, list(state), drives[layer]))
            residuals[sweep] = torch.maximum(residuals[sweep], (new - state[layer]).abs().amax(dim=-1))
            state[layer] = new
    return residuals


def draw_relaxation(residuals: torch.Tensor, tolerance: float, path: str | Path | None = None) -> "Figure":
    """
    Draws the rows' residuals against sweeps: the median, the slowest and the fastest row, and the tolerance.

    Args:
        residuals (`torch.Tensor` of shape `(num_sweeps, rows)`):
            See [`residual_curve`].
        tolerance (`float`):
            Where the relaxation stops.
        path (`str` or `Path`, *optional*):
            PNG to write.

    Returns:
        `matplotlib.figure.Figure`
    """
    figure, (axes,) = new_axes()
    # Zero, where nothing changes any more, has no place on a logarithmic axis
    curves = residuals.double().cpu().clamp_min(torch.finfo(residuals.dtype).tiny)
    sweeps = range(1, len(curves) + 1)
    axes.fill_between(sweeps, curves.amin(dim=1), curves.amax(dim=1), color=COLORS[0], alpha=0.2, label="all rows")
    axes.plot(sweeps, curves.median(dim=1).values, color=COLORS[0], label="median")
    axes.plot(sweeps, curves.amax(dim=1), color=COLORS[1], label="slowest in each sweep")
    axes.axhline(tolerance, color="0.4", linestyle="--", linewidth=1, label=f"tolerance {tolerance:g}")
    waiting = int((curves[-1] > tolerance).sum())
    axes.set(yscale="log", xlabel="sweeps", ylabel="largest change of an activity")
    lowest = max(min(curves[curves > torch.finfo(residuals.dtype).tiny].min().item(), tolerance) / 3, 1e-9)
    axes.set_ylim(bottom=lowest)
    axes.set_title(f"{waiting} of {curves.shape[1]} rows above the tolerance after {len(curves)} sweeps", loc="left")
    axes.legend(frameon=False, fontsize=8)
    if path is not None:
        save_figure(figure, path)
    return figure
