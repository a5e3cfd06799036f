"""How fast the head relaxes, sweep by sweep, as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.figures import COLORS, new_axes, save_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    axes.plot(sweeps, curves.amax(dim=1), color=COLORS[1], linestyle="-.", label="slowest in each sweep")
    axes.axhline(tolerance, color="0.4", linestyle=":", linewidth=1.4, label=f"tolerance {tolerance:g}")
    waiting = int((curves[-1] > tolerance).sum())
    axes.set(yscale="log", xlabel="sweeps", ylabel="largest change of an activity")
    lowest = max(min(curves[curves > torch.finfo(residuals.dtype).tiny].min().item(), tolerance) / 3, 1e-9)
    axes.set_ylim(bottom=lowest)
    axes.set_title(f"{waiting} of {curves.shape[1]} rows above the tolerance after {len(curves)} sweeps", loc="left")
    axes.legend(frameon=False, fontsize=9)
    if path is not None:
        save_figure(figure, path)
    return figure
