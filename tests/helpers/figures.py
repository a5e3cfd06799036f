"""What a stranger needs in a picture."""

from itertools import combinations

import matplotlib.text
from matplotlib.ticker import FixedFormatter, FuncFormatter


# Width, in pixels, of a picture on a page, and the least height there of its letters
PAGE, LETTERS = 800, 7.5


def kept_figures(monkeypatch, draw=False):
    """The pictures that are saved from now on, most of which need not be drawn."""
    from matplotlib.figure import Figure

    kept, save = [], Figure.savefig

    def keep(figure, path, **kwargs):
        kept.append(figure)
        if draw or not hasattr(path, "with_name"):
            save(figure, path, **kwargs)
        else:
            path.write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def handles_of(axes):
    """Lines and points with a label, by label."""
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def look(handle):
    """How a line looks in grey; `None` of what is no line."""
    line = handle[0] if isinstance(handle, tuple) else handle
    return (line.get_marker(), str(line.get_linestyle()), line._dash_pattern) if hasattr(line, "get_marker") else None


def faults(figure, headings_name_axes=False):
    """
    What a reader would miss in a picture: a name of an axis, a legend, lines that differ by more than their colour,
    the direction of a KL, letters of a size that can be read.
    """
    found = []
    panels = [axes for axes in figure.axes if axes.get_visible() and axes.axison and axes.get_label() != "<colorbar>"]
    explained = {text.get_text() for axes in panels if axes.get_legend() for text in axes.get_legend().get_texts()}
    for number, axes in enumerate(panels, start=1):
        below = axes.get_shared_x_axes().get_siblings(axes)
        beside = axes.get_shared_y_axes().get_siblings(axes)
        words = isinstance(axes.yaxis.get_major_formatter(), FixedFormatter | FuncFormatter)
        heading = headings_name_axes and axes.get_title(loc="left")
        if not (figure.get_supxlabel() or any(one.get_xlabel() for one in below)) and not headings_name_axes:
            found.append(f"panel {number}: no name of the horizontal axis")
        if not (figure.get_supylabel() or words or heading or any(one.get_ylabel() for one in beside)):
            found.append(f"panel {number}: no name of the upright axis")
        handles = handles_of(axes)
        if len(handles) > 1 and not set(handles) <= explained:
            found.append(f"panel {number}: not in a legend: {sorted(set(handles) - explained)}")
        looks = {label: look(handle) for label, handle in handles.items()}
        found += [
            f"panel {number}: {one} and {other} differ by colour alone"
            for one, other in combinations([label for label in looks if looks[label]], 2)
            if looks[one] == looks[other]
        ]
    found += [
        "a colour bar without a name"
        for axes in figure.axes
        if axes.get_label() == "<colorbar>" and not axes.get_ylabel()
    ]
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
    least = min((text.get_fontsize() for text in texts), default=10.0)
    if not headings_name_axes and least / 72 / figure.get_figwidth() * PAGE < LETTERS:
        found.append(f"letters of {least:g} points in a picture {figure.get_figwidth():g} inches wide")
    figure.draw_without_rendering()
    edges = figure.bbox.padded(2)
    # Of ticks there are some beyond the ends of an axis, which are not drawn
    scales = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = {id(text) for axis in scales for text in axis.get_ticklabels(which="both")}
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if id(text) not in ticks]
    found += [
        f"beyond the edge: {text}"
        for text, box in boxes
        if text.strip() and not (edges.contains(box.x0, box.y0) and edges.contains(box.x1, box.y1))
    ]
    measured = [text.get_text() for text in texts if "nats" in text.get_text() and "loss" not in text.get_text()]
    found += [f"which KL: {text}" for text in measured if "||" not in text]
    return found
