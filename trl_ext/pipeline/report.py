"""The report of a pipeline: one HTML file with all in it, which asks for nothing from elsewhere."""

import base64
import html
import math
import os
import platform
import shlex
import struct
from collections.abc import Collection, Iterable
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..core.safe_text import redacted, shown_folder
from .definition import Pipeline, Stage
from .findings import Findings, read_findings
from .progress import Marker, Progress


REPORT_FILE = "report.html"
_PACKAGES = ("trl-ext", "trl", "transformers", "torch", "accelerate", "datasets")
# Of a picture that gets a row of its own: width by height, or width in pixels
_BROAD, _WIDE = 1.8, 1300
_STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--soft:#5b6675;--page:#f6f7f9;--card:#fff;--line:#d9dee5;--accent:#2563ba;
--bar:#3b7dd8;--code:#eef1f5;--good:#1c7a45;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ee;--soft:#9aa6b5;--page:#12161c;--card:#1b212a;--line:#323b47;
--accent:#8ab8ff;--bar:#5c97e6;--code:#11151b;--good:#6fcf97;--bad:#ff9a92}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:68rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.2rem;margin:0 0 .6rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.3rem 0 .6rem}a{color:var(--accent)}.soft{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1.1rem 1.2rem;margin:1.1rem 0;
scroll-margin-top:1rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.93rem}
th,td{text-align:left;vertical-align:top;padding:.4rem .7rem .4rem 0;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600;white-space:nowrap}td.number{text-align:right;font-variant-numeric:tabular-nums;
white-space:nowrap}th.number{text-align:right}
.time{min-width:7rem}
.time i{display:block;height:.5rem;min-width:2px;border-radius:3px;background:var(--bar);margin-top:.3rem}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.5rem 1.2rem;margin:.6rem 0}
dl div{border-left:3px solid var(--line);padding-left:.6rem}
dt{color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
dd{margin:0;font-variant-numeric:tabular-nums;font-size:1.05rem}
pre{background:var(--code);border-radius:6px;padding:.7rem .8rem;overflow-x:auto;
font:.85rem/1.5 ui-monospace,monospace;
margin:.4rem 0}pre.command{white-space:pre-wrap;overflow-wrap:anywhere}
.curves,.pictures{display:grid;gap:.4rem 1rem;align-items:start;margin:.8rem 0}
.curves{grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr))}
.pictures{grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr))}
figure{margin:0;min-width:0}.row{grid-column:1/-1}
figure img{max-width:100%;height:auto;background:#fff;border:1px solid var(--line);border-radius:6px;
padding:6px;display:block}figcaption{color:var(--soft);font-size:.88rem;margin-bottom:.25rem}
summary{cursor:pointer;color:var(--accent)}details{margin:.6rem 0}
td.text{white-space:pre-wrap;overflow-wrap:anywhere;min-width:14rem}
"""


def write_report(pipeline: Pipeline, progress: Progress, ran: Collection[str]) -> Path:
    """
    Writes the report in one move.

    Args:
        pipeline ([`Pipeline`]):
            Pipeline.
        progress ([`Progress`]):
            Its markers.
        ran (`Collection[str]`):
            Names of the stages that this command has run to their end.

    Returns:
        `Path`: the file, `report.html` in the pipeline's folder.
    """
    path = pipeline.output_dir / REPORT_FILE
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(report_html(pipeline, progress, ran), encoding="utf-8", errors="replace")
    os.replace(partial, path)
    return path


def report_html(pipeline: Pipeline, progress: Progress, ran: Collection[str]) -> str:
    """The report as a whole page; arguments as in [`write_report`]."""
    markers = {stage.name: progress.marker(stage.name) for stage in pipeline.stages}
    seconds = [marker.seconds for marker in markers.values() if marker]
    done = sum(bool(marker and marker.done) for marker in markers.values())
    title = pipeline.title or pipeline.path
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{done} of {len(pipeline.stages)} stages done, {_time(sum(seconds))} in all; written '
        f"{datetime.now():%Y-%m-%d %H:%M} on {_text(_machine())}.</p>",
        _overview(pipeline, markers, ran),
    ]
    parts += [_stage(pipeline, progress, stage, markers[stage.name]) for stage in pipeline.stages]
    command = ["trl-ext", "pipeline", "--config", pipeline.path, "--output_dir", str(pipeline.output_dir)]
    parts.append(
        f"<section><h2>The pipeline</h2>{_command(command)}{_folded(pipeline.path, pipeline.text)}{_versions()}"
        "</section>"
    )
    # Nothing is fetched, whatever may stand in a name
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _overview(pipeline: Pipeline, markers: dict[str, Marker | None], ran: Collection[str]) -> str:
    longest = max([marker.seconds for marker in markers.values() if marker], default=0.0) or 1.0
    rows = []
    for stage in pipeline.stages:
        marker = markers[stage.name]
        state = _state(marker, stage.name in ran)
        seconds = marker.seconds if marker else 0.0
        bar = f'{_time(seconds)}<i style="width:{100 * seconds / longest:.0f}%"></i>' if marker else ""
        reads = ", ".join(_link(name) for name in stage.reads())
        rows.append(
            f"<tr><td>{_link(stage.name)}</td><td>{_text(stage.command)}</td><td>{reads}</td><td>{state}</td>"
            f'<td class="time">{bar}</td></tr>'
        )
    head = "".join(f"<th>{name}</th>" for name in ("stage", "command", "reads", "state", "time"))
    return f'<section><h2>Stages</h2><div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div></section>'


def _state(marker: Marker | None, ran: bool) -> str:
    if marker is None:
        return '<span class="soft">not begun</span>'
    if not marker.done:
        return '<span class="bad">not finished</span>'
    return f'<span class="good">{"done now" if ran else "done before"}</span>'


def _stage(pipeline: Pipeline, progress: Progress, stage: Stage, marker: Marker | None) -> str:
    head = f'<section id="{_text(stage.name)}"><h2>{_text(stage.name)}</h2>'
    if marker is None:
        return f'{head}<p class="soft">{_text(stage.command)}, not begun.</p></section>'
    folder = pipeline.folder(stage)
    found = read_findings(folder)
    parts = [
        head,
        f'<p class="soft">{_text(stage.command)}, {_time(marker.seconds)}, in {_text(shown_folder(folder))}</p>',
        _numbers(found.numbers),
        "".join(f"<h3>{_text(heading)}</h3>{_numbers(numbers)}" for heading, numbers in found.logged.items()),
        "".join(f"<p>{_text(note)}</p>" for note in found.notes),
        _pictures(found.curves, "curves"),
        _pictures(found.pictures, "pictures"),
        f'<p class="soft">{found.left_out} more pictures in the folder.</p>' if found.left_out else "",
        _examples(found),
        _command(marker.command),
        _recipe(progress.recipe_path(stage)),
        "</section>",
    ]
    return "\n".join(filter(None, parts))


def _numbers(numbers: Iterable[tuple[str, float]]) -> str:
    entries = "".join(f"<div><dt>{_text(name)}</dt><dd>{_number(value)}</dd></div>" for name, value in numbers)
    return f"<dl>{entries}</dl>" if entries else ""


def _pictures(pictures: Iterable[tuple[str, bytes]], kind: str) -> str:
    """Pictures beside each other where there is room."""
    figures = "".join(_picture(title, data) for title, data in pictures)
    return f'<div class="{kind}">{figures}</div>' if figures else ""


def _picture(title: str, data: bytes) -> str:
    encoded = base64.b64encode(data).decode()
    width, height = struct.unpack(">II", data[16:24]) if len(data) >= 24 else (1, 1)  # of a PNG's head
    row = ' class="row"' if width > min(_BROAD * height, _WIDE) else ""
    return (
        f'<figure{row}><figcaption>{_text(title)}</figcaption><img alt="{_text(title)}" '
        f'src="data:image/png;base64,{encoded}"></figure>'
    )


def _examples(found: Findings) -> str:
    if not found.examples:
        return ""
    names = list(found.examples[0])
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    rows = "".join(
        f"<tr>{''.join(f'<td class=text>{_text(_shown(row.get(name)))}</td>' for name in names)}</tr>"
        for row in found.examples
    )
    return f'<h3>The first of its data</h3><div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _shown(value: Any) -> str:
    """A text or messages, shortened."""
    if isinstance(value, list):
        value = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value if isinstance(turn, dict))
    text = str(value)
    return text if len(text) <= 600 else f"{text[:600]} \N{HORIZONTAL ELLIPSIS}"


def _command(words: list[str]) -> str:
    return f'<pre class="command">{_text(shlex.join(words))}</pre>' if words else ""


def _recipe(path: Path) -> str:
    if not path.is_file():
        return ""
    return _folded("Settings", path.read_text(encoding="utf-8"))


def _folded(title: str, text: str) -> str:
    """A file that opens on a click, without lines that hold a token."""
    shown = "\n".join(line for line in text.splitlines() if "hub_token" not in line)
    return f"<details><summary>{_text(title)}</summary><pre>{_text(shown)}</pre></details>"


def _versions() -> str:
    rows = []
    for name in _PACKAGES:
        try:
            rows.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f'<p class="soft">{_text(", ".join([f"Python {platform.python_version()}", *rows]))}</p>'


def _machine() -> str:
    return f"{platform.system()}, {os.cpu_count()} CPUs"


def _link(name: str) -> str:
    return f'<a href="#{_text(name)}">{_text(name)}</a>'


def _time(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else "none"


def _text(value: object) -> str:
    """Text as HTML shows it, in an attribute too; control signs are replaced, and secrets hidden."""
    plain = "".join(
        sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in redacted(str(value))
    )
    return html.escape(plain, quote=True)
