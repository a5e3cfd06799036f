"""The picture of the sentiment frontier."""

from pathlib import Path

from matplotlib.patheffects import withStroke

from trl_ext.core.figures import line_style, new_axes, save_figure


# A method's points: KL, reward, the spreads of both, beta
Frontier = list[tuple[float, float, float, float, float]]


def draw_frontiers(frontiers: dict[str, Frontier], path: Path) -> None:
    """Reward against KL, a panel for each method; grey lines are the other methods."""
    figure, panels = new_axes(2, 3, width=3.4, height=3.2, sharex=True, sharey=True)
    for position, (axes, method) in enumerate(zip(panels, frontiers, strict=False)):
        for other, points in frontiers.items():
            x, y, dx, dy, betas = zip(*sorted(points), strict=True)
            if other != method:
                axes.plot(x, y, color="#c4c4c4", linewidth=1, zorder=1)
                continue
            axes.errorbar(x, y, xerr=dx, yerr=dy, capsize=2, linewidth=1.6, **line_style(position))
            for place, (px, py, beta) in enumerate(zip(x, y, betas, strict=True)):
                # Away from the neighbours, with a white rim over lines and bars
                neighbours = [*y[max(0, place - 1) : place], *y[place + 1 : place + 2]]
                above = py >= sum(neighbours) / max(1, len(neighbours))
                is_last = place == len(x) - 1
                text = axes.annotate(
                    f"{beta:g}", (px, py), textcoords="offset points", xytext=(4 * is_last, 6 if above else -6),
                    ha="left" if is_last else "center", va="bottom" if above else "top", fontsize=9,
                )  # fmt: skip
                text.set_path_effects([withStroke(linewidth=3, foreground="white")])
        axes.set_title(method, loc="left", fontsize=10)
    for axes in panels[3:]:
        axes.set_xlabel("KL(policy || reference),\nnats per response", fontsize=9)
    for axes in panels[::3]:
        axes.set_ylabel("P(positive sentiment)", fontsize=9)
    figure.suptitle("Numbers: beta; bars: standard deviation over seeds; grey: the other methods", fontsize=10)
    save_figure(figure, path)
