"""Tokens coloured by weight: on the terminal, as HTML and as PNG."""

import html
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Colormap, ListedColormap, to_hex, to_rgb
from rich.text import Text
from transformers import PreTrainedTokenizerBase


COLOR_MAP = colormaps["YlOrRd"]
LINE_WIDTH = 104
NEWLINE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
MAX_PIXELS = 60_000
_CONTROL_SIGNS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}


@dataclass
class WeightedText:
    """
    A text in pieces, each with a weight.

    Attributes:
        title (`str`): What it is.
        pieces (`list[str]`): Pieces of text, spaces included.
        weights (`list[float]`): Weight of each piece, not negative; `nan` for text that has none, such as a prompt.
    """

    title: str
    pieces: list[str]
    weights: list[float]


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """
    The text that each token adds, whatever the tokenizer's own signs for spaces and bytes.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        ids (`list[int]`):
            Token ids.

    Returns:
        `list[str]`, one piece for each id; together they are the decoded text. Of the tokens that share a character,
            the last one has it and the others are empty.
    """
    text = tokenizer.decode(ids)
    ends = [0]
    for count in range(1, len(ids)):
        # Bytes of an unfinished character decode to something that is not in the whole text
        start = tokenizer.decode(ids[:count])
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(start, text, strict=False)))
        ends.append(max(ends[-1], common))
    return [text[start:end] for start, end in pairwise([*ends, len(text)])] if ids else []


def shortened(text: WeightedText, num_unweighted: int = 300, num_weighted: int = 4000) -> WeightedText:
    """
    Cuts a long text, so that its weights stay in view.

    Args:
        text ([`WeightedText`]):
            Text.
        num_unweighted (`int`, *optional*, defaults to `300`):
            Characters to keep of the text before the first weight, from its end.
        num_weighted (`int`, *optional*, defaults to `4000`):
            Characters to keep from the first weight on.

    Returns:
        [`WeightedText`], with an ellipsis where something was cut.
    """
    first = next((i for i, weight in enumerate(text.weights) if not np.isnan(weight)), len(text.weights))
    lengths = [len(piece) for piece in text.pieces]
    start = first - int(np.searchsorted(np.cumsum(lengths[:first][::-1]), num_unweighted, side="right"))
    end = first + int(np.searchsorted(np.cumsum(lengths[first:]), num_weighted, side="right"))
    pieces, weights = text.pieces[start:end], text.weights[start:end]
    if start > 0:
        pieces, weights = [f"{ELLIPSIS} ", *pieces], [float("nan"), *weights]
    if end < len(text.pieces):
        pieces, weights = [*pieces, f" {ELLIPSIS}"], [*weights, float("nan")]
    return WeightedText(text.title, pieces, weights)


def _color(weight: float, highest: float) -> str | None:
    if np.isnan(weight):
        return None
    return to_hex(COLOR_MAP(0.85 * weight / highest)) if weight > 0 and highest > 0 else "#ffffff"


def _ink(color: str) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = to_rgb(color)
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.45 else "#222222"


def highest_weight(texts: list[WeightedText]) -> float:
    """The weight that gets the darkest colour."""
    return max((w for text in texts for w in text.weights if not np.isnan(w)), default=0.0)


def to_rich(text: WeightedText, highest: float) -> Text:
    """One weighted text for the terminal."""
    result = Text()
    for piece, weight in zip(text.pieces, text.weights, strict=True):
        color = _color(weight, highest)
        shown = piece.replace("\n", f"{NEWLINE}\n").translate(_CONTROL_SIGNS)
        result.append(shown, style="dim" if color is None else f"{_ink(color)} on {color}")
    return result


def to_numbers(text: WeightedText) -> Text:
    """One weighted text for a terminal or a file without colours: behind each weighted token its weight."""
    result = Text()
    for piece, weight in zip(text.pieces, text.weights, strict=True):
        shown = piece.replace("\n", f"{NEWLINE}\n").translate(_CONTROL_SIGNS)
        result.append(shown if np.isnan(weight) else f"{shown}[{weight:.2f}]")
    return result


def to_html(texts: list[WeightedText], heading: str) -> str:
    """A whole HTML page; hovering over a token shows its weight."""
    highest = highest_weight(texts)
    parts = []
    for text in texts:
        spans = []
        for piece, weight in zip(text.pieces, text.weights, strict=True):
            color, shown = _color(weight, highest), html.escape(piece).replace("\n", f"{NEWLINE}<br>")
            if color is None:
                spans.append(f'<span class="plain">{shown}</span>')
            else:
                spans.append(
                    f'<span style="background:{color};color:{_ink(color)}" title="{weight:.3f}">{shown}</span>'
                )
        parts.append(f"<h2>{html.escape(text.title)}</h2>\n<p>{''.join(spans)}</p>")
    style = (
        "body{font-family:sans-serif;max-width:60em;margin:2em auto;color:#222}h1{font-size:1.3em}"
        "h2{font-size:1em;margin-bottom:.2em}p{line-height:1.9;white-space:pre-wrap;margin-top:0}"
        "span{border-radius:3px;padding:2px 1px}.plain{color:#888}"
    )
    legend = f"White is weight 0, the darkest colour {highest:.3f}; grey text has no weight."
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(heading)}</title>'
        f"<style>{style}</style></head>\n<body><h1>{html.escape(heading)}</h1>\n<p>{legend}</p>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def color_scale() -> Colormap:
    """The colours of weights from just above 0, which has white beneath them, to the highest."""
    return ListedColormap([to_hex(COLOR_MAP(0.85 * x)) for x in np.linspace(0, 1, 128)]).with_extremes(under="#ffffff")


def save_png(texts: list[WeightedText], heading: str, path: str | Path) -> None:
    """
    Draws the texts with a colour bar.

    Args:
        texts (`list[WeightedText]`):
            Texts, from top to bottom.
        heading (`str`):
            Title of the picture.
        path (`str` or `Path`):
            PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    highest = highest_weight(texts)
    layout: list[tuple[float, float, str, str | None, bool]] = []
    line = 0.0
    for text in texts:
        layout.append((0, line, text.title, None, True))
        line = _place(shortened(text), line + 1.25, highest, layout.append) + 1.9
    line -= 0.9
    height = max(2.0, 0.235 * line + 1.0)
    figure = Figure(figsize=(10.5, height), dpi=min(130, MAX_PIXELS / height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.03, 0.3 / height, 0.88, 1 - 0.9 / height))
    axes.set_xlim(0, LINE_WIDTH)
    axes.set_ylim(line, -0.8)
    axes.axis("off")
    figure.suptitle(heading, x=0.03, y=1 - 0.14 / height, ha="left", va="top", fontsize=12, fontweight="bold",
                    parse_math=False)  # fmt: skip
    for column, row, piece, color, is_title in layout:
        if color is not None:
            axes.add_patch(_rectangle(column, row, len(piece), color))
        axes.text(
            column, row, piece, family="sans-serif" if is_title else "monospace", fontsize=10.6,
            fontweight="bold" if is_title else "normal", va="center", parse_math=False,
            color="#222222" if is_title else "#8a8a8a" if color is None else _ink(color),
        )  # fmt: skip
    bar_axes = figure.add_axes((0.935, 0.2, 0.014, 0.6))
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, highest or 1.0), color_scale()), cax=bar_axes, extend="min", extendrect=True,
        extendfrac=0.06, label="token weight",
    )  # fmt: skip
    # Zero is the white box below the scale, which begins right above it
    bar.set_ticks([tick for tick in bar.get_ticks() if 0 < tick <= (highest or 1.0)])
    bar_axes.text(1.5, -0.03, "0", transform=bar_axes.transAxes, va="center")
    figure.savefig(path)


def _rectangle(column: float, row: float, width: int, color: str):
    from matplotlib.patches import Rectangle

    return Rectangle((column, row - 0.52), width, 1.04, color=color, linewidth=0)


def _drawable(piece: str) -> str:
    """The text with newlines marked, and a box for what the font lacks."""
    from matplotlib.font_manager import findfont, get_font

    has_glyph = get_font(findfont("monospace")).get_char_index
    marked = piece.replace("\t", "    ").replace("\n", f"{NEWLINE}\n")
    return "".join(sign if sign == "\n" or has_glyph(ord(sign)) else "\N{WHITE SQUARE}" for sign in marked)


def _place(text: WeightedText, line: float, highest: float, add: Callable[[tuple], None]) -> float:
    """Breaks a text into lines of fixed-width characters; returns the last line."""
    column = 0
    for piece, weight in zip(text.pieces, text.weights, strict=True):
        for index, part in enumerate(_drawable(piece).split("\n")):
            if index:
                line, column = line + 1.25, 0
            if column and column + len(part) > LINE_WIDTH:
                line, column, part = line + 1.25, 0, part.lstrip(" ")
            while part:
                add((column, line, part[:LINE_WIDTH], _color(weight, highest), False))
                column, part = column + len(part[:LINE_WIDTH]), part[LINE_WIDTH:]
                if part:
                    line, column = line + 1.25, 0
    return line
