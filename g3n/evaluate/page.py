"""A page of an evaluation that needs nothing but itself: tables with n and intervals, pictures inside, the line that makes each part again."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .2rem .8rem; text-align: left; border-bottom: 1px solid #eee; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } tr.group th { padding-top: .9rem; color: #555; font-weight: 600; }
pre { background: #f5f5f3; padding: .6rem .8rem; overflow-x: auto; } img { max-width: 100%; } p.note { color: #555; }
"""


@dataclass(frozen=True)
class Part:
    """One evaluation: ``metrics`` as in its metrics.json, ``command`` makes it again."""

    title: str
    command: str
    metrics: Mapping[str, Any]
    pictures: Sequence[Path] = ()
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A row of a table: a figure, or the heading of a group where ``value`` is None."""

    name: str
    depth: int
    value: str | None
    interval: str = ""
    n: str = ""


def lines(metrics: Mapping[str, Any], depth: int = 0) -> Iterator[Line]:
    """Rows of a tree of metrics. A mapping with ``value``, ``low`` and ``high`` is a figure with its interval."""
    for name, value in metrics.items():
        label = str(name).replace("_", " ")
        if isinstance(value, Mapping):
            if {"value", "low", "high"} <= value.keys():
                ends = [_number(value[end]) for end in ("low", "high")]
                interval = f"{ends[0]} to {ends[1]}" if all(ends) else ""
                yield Line(label, depth, _number(value["value"]) or "not defined", interval, _count(value))
            elif value:
                yield Line(label, depth, None)
                yield from lines(value, depth + 1)
        elif isinstance(value, (list, tuple)):
            yield Line(label, depth, ", ".join(_number(v) or str(v) for v in value))
        else:
            yield Line(
                label, depth, (_number(value) or "not defined") if value is None or _is_number(value) else str(value)
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> str:
    """Four digits that matter; empty where there is no number."""
    if not _is_number(value) or not math.isfinite(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _count(value: Mapping[str, Any]) -> str:
    n, subjects = value.get("n"), value.get("subjects")
    return "" if n is None else f"{n}" if subjects in (None, n) else f"{n} of {subjects} subjects"


def write_page(path: Path, title: str, about: Mapping[str, Any], parts: Sequence[Part]) -> None:
    """Write the page, atomically. Pictures (PNG, SVG) are put into it; nothing is loaded from elsewhere."""
    body = [f"<h1>{html.escape(title)}</h1>", _table(lines(about))]
    body += ["<p>Intervals are 95 % bootstrap intervals over subjects unless a line says otherwise; n counts rows.</p>"]
    body.append(
        "<ul>" + "".join(f'<li><a href="#{i}">{html.escape(p.title)}</a></li>' for i, p in enumerate(parts)) + "</ul>"
    )
    for i, part in enumerate(parts):
        body.append(f'<h2 id="{i}">{html.escape(part.title)}</h2>')
        if part.note:
            body.append(f'<p class="note">{html.escape(part.note)}</p>')
        body += [f'<img alt="{html.escape(p.stem)}" src="{_data_url(p)}">' for p in part.pictures]
        body += [_table(lines(part.metrics)), f"<pre>{html.escape(part.command)}</pre>"]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part_file = path.with_name(f".{path.name}.part")
    part_file.write_text(page, encoding="utf-8")
    part_file.replace(path)


def _data_url(path: Path) -> str:
    kind = {".png": "image/png", ".svg": "image/svg+xml"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _table(rows: Iterator[Line]) -> str:
    cells = []
    for row in rows:
        indent = f' style="padding-left:{0.8 + 1.2 * row.depth}rem"'
        name = html.escape(row.name)
        if row.value is None:
            cells.append(f'<tr class="group"><th colspan="4"{indent}>{name}</th></tr>')
        else:
            numbers = "".join(f'<td class="n">{html.escape(text)}</td>' for text in (row.value, row.interval, row.n))
            cells.append(f"<tr><td{indent}>{name}</td>{numbers}</tr>")
    return f"<table><tr><th></th><th>value</th><th>interval</th><th>n</th></tr>{''.join(cells)}</table>"
