"""The one place where pictures are set up: no pyplot, so no window, no global state, and safe in any thread."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart without red against green, and in grey by their order with MARKERS
COLORS = ("#3b7dd8", "#e88a1a", "#2f9e5b", "#8e5bb5", "#17a2a2", "#a0632a", "#d36ba6", "#7f8c2a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)), (0, (3, 3)))


def line_style(position: int) -> dict[str, Any]:
    """
    Colour, marker and dashes of a line, told apart in grey and without red against green.

    Args:
        position (`int`):
            Place of the line among its panel's; every eighth has the same colour and other dashes.

    Returns:
        `dict[str, Any]`: keyword arguments of `Axes.plot`.
    """
    turn = position // len(COLORS)
    return {
        "color": COLORS[position % len(COLORS)],
        "marker": MARKERS[(position + 3 * turn) % len(MARKERS)],
        "linestyle": LINES[(position + turn) % len(LINES)],
    }


def new_figure(width: float, height: float, dpi: int = 130) -> "Figure":
    """
    An empty picture that draws itself without a window.

    Args:
        width (`float`):
            Width in inches.
        height (`float`):
            Height in inches.
        dpi (`int`, *optional*, defaults to `130`):
            Pixels per inch.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(
    rows: int = 1, columns: int = 1, width: float = 6.6, height: float = 4.8, dpi: int = 130, **kwargs: Any
) -> tuple["Figure", list["Axes"]]:
    """
    A picture with panels, each with a light grid and two spines.

    Args:
        rows (`int`, *optional*, defaults to `1`):
            Rows of panels.
        columns (`int`, *optional*, defaults to `1`):
            Columns of panels.
        width (`float`, *optional*, defaults to `6.6`):
            Width of a panel in inches.
        height (`float`, *optional*, defaults to `4.8`):
            Height of a panel in inches.
        dpi (`int`, *optional*, defaults to `130`):
            Pixels per inch.
        kwargs (`Any`):
            Passed to `Figure.subplots`, such as `sharey=True`.

    Returns:
        `tuple[matplotlib.figure.Figure, list[matplotlib.axes.Axes]]`: the picture, and its panels row by row.
    """
    figure = new_figure(width * columns, height * rows, dpi)
    panels = list(figure.subplots(rows, columns, squeeze=False, **kwargs).flat)
    for axes in panels:
        tidy(axes)
    return figure, panels


def tidy(axes: "Axes") -> None:
    """
    Gives a panel the house's look.

    Args:
        axes (`matplotlib.axes.Axes`):
            Panel.
    """
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: "Figure", path: str | Path) -> None:
    """
    Writes a picture as PNG in one move, so that a viewer never sees half of it; folders are made.

    Args:
        figure (`matplotlib.figure.Figure`):
            Picture.
        path (`str` or `Path`):
            File to write or to replace.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
