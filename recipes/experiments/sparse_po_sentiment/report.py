"""The picture of the sentiment frontier."""

from pathlib import Path

from trl_ext.core.figures import line_style, new_axes, save_figure


# A method's points: KL, reward, the spreads of both, beta
Frontier = list[tuple[float, float, float, float, float]]


def draw_frontiers(frontiers: dict[str, Frontier], path: Path) -> None:
    """Reward against KL, a panel for each method; grey lines are the other methods."""
    figure, panels = new_axes(2, 3, width=3.8, height=3.2, dpi=120, sharex=True, sharey=True)
    for position, (axes, method) in enumerate(zip(panels, frontiers, strict=False)):
        for other, points in frontiers.items():
            x, y, dx, dy, betas = zip(*sorted(points), strict=True)
            if other != method:
                axes.plot(x, y, color="#c4c4c4", linewidth=1, zorder=1)
                continue
            axes.errorbar(x, y, xerr=dx, yerr=dy, capsize=2, linewidth=1.6, **line_style(position))
            for px, py, beta in zip(x, y, betas, strict=True):
                axes.annotate(f"{beta:g}", (px, py), textcoords="offset points", xytext=(5, 5), fontsize=8)
        axes.set_title(method, loc="left", fontsize=10)
    for axes in panels[3:]:
        axes.set_xlabel("KL(policy || reference), nats a response", fontsize=8)
    for axes in panels[::3]:
        axes.set_ylabel("probability of positive sentiment", fontsize=8)
    figure.suptitle("Numbers: beta; bars: standard deviation over seeds; grey: the other methods", fontsize=10)
    save_figure(figure, path)
