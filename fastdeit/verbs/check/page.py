"""The report of `data check` as one HTML page: no script, nothing loaded from elsewhere, every name escaped."""

import base64
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from fastdeit.text import one_line
from fastdeit.verbs.check.report import Finding, Report, Split
from fastdeit.verbs.check.samples import Odd

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { border-bottom: 1px solid #ccc; margin-top: 2.5rem } .serious { color: #a40000 }
figure { display: inline-block; margin: 0 .6rem .9rem 0; vertical-align: top; width: 9rem }
figure img { display: block; max-width: 6rem; max-height: 6rem; background: #eee } figcaption, li { font-size: 13px }
figcaption, li { overflow-wrap: anywhere } svg { background: #f6f6f6; margin: .3rem 1.5rem .3rem 0 }
svg rect { fill: #3465a4 } svg text { font-size: 11px; fill: #444 } table { border-collapse: collapse }
td, th { padding: .1rem .8rem; text-align: left; border-bottom: 1px solid #eee }
"""
# Should a name ever get past `escape`, the browser still runs and loads nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_WIDTH, _HEIGHT, _BINS = 480, 110, 32
_LISTED = 500


def page(report: Report) -> str:
    """The whole page."""
    title = f"fastdeit data check {_text(report.path)}"
    verdict = "nothing found that would change a training" if report.ok else "some findings would change a training"
    parts = [
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{_STYLE}</style></head><body>',
        f"<h1>{title}</h1><p>Read as {_text(report.kind)}; {verdict}.</p>",
        *map(_finding, report.findings),
        *map(_split, report.splits),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _text(text: object) -> str:
    return escape(one_line(text))


def _split(split: Split) -> str:
    sides = np.minimum(split.widths, split.heights)
    parts = [f"<h2>{_text(split.name)}: {split.samples:,} samples</h2><p>"]
    if len(sides):
        ratios = split.widths / split.heights
        parts += [_histogram("shorter side in pixels", sides), _histogram("width over height", ratios)]
    parts += [_bars("samples of each class", [count for _, count in split.classes]), "</p>"]
    tables = ("formats", split.formats.items()), ("decoders", split.decoders.items()), ("classes", split.classes)
    parts += [_table(what, "samples", rows) for what, rows in tables]
    parts += map(_finding, split.findings)
    if split.sheet:
        parts.append("<h3>Odd ones, as training sees them</h3>")
        parts += [_figure(path, one) for path, one in split.sheet]
    return "\n".join(parts)


def _finding(finding: Finding) -> str:
    kind = ' class="serious"' if finding.serious else ""
    if not finding.entries:
        return f"<p{kind}>{_text(finding.text)}</p>"
    items = "".join(f"<li>{_text(entry)}</li>" for entry in finding.entries[:_LISTED])
    more = len(finding.entries) - _LISTED
    items += f"<li>and {more:,} more</li>" if more > 0 else ""
    title = f"{_text(finding.text)} ({len(finding.entries):,})"
    return f"<details{' open' if finding.serious else ''}><summary{kind}>{title}</summary><ul>{items}</ul></details>"


def _table(what: str, count: str, rows: Sequence[tuple[str, int]]) -> str:
    cells = "".join(f"<tr><td>{_text(name)}</td><td>{number:,}</td></tr>" for name, number in rows)
    head = f"<tr><th>{what}</th><th>{count}</th></tr>"
    return f"<details><summary>{len(rows):,} {what}</summary><table>{head}{cells}</table></details>"


def _figure(path: str, one: Odd) -> str:
    data = base64.b64encode(one.jpeg).decode()
    caption = f"{_text(path)}<br><b>{_text('; '.join(one.kinds))}</b><br>{_text(f'read by {one.decoder}')}"
    return f'<figure><img alt="" src="data:image/jpeg;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def _histogram(title: str, values: NDArray[np.generic]) -> str:
    """Bins of equal ratio: sizes of pictures differ by factors."""
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, np.geomspace(low, max(high, low * 1.01), _BINS + 1))
    return _bars(f"{title}: {low:.3g} to {high:.3g}, a bin is a ratio", counts.tolist())


def _bars(title: str, counts: Sequence[int]) -> str:
    top, step = max(max(counts), 1), _WIDTH / len(counts)
    bars = "".join(
        f'<rect x="{at * step:.2f}" y="{_HEIGHT - _HEIGHT * count / top:.1f}" width="{max(step - 0.5, 0.5):.2f}" '
        f'height="{_HEIGHT * count / top:.1f}"/>'
        for at, count in enumerate(counts)
        if count
    )
    text = f'<text x="2" y="{_HEIGHT + 15}">{_text(title)}; most: {top:,}</text>'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 20}" width="{_WIDTH}" height="{_HEIGHT + 20}">{bars}{text}</svg>'
