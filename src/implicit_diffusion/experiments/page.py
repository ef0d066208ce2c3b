"""The HTML page of a report: one file that needs nothing else, neither network nor script.

Pictures are embedded, everything that a user named is escaped, and a content security policy forbids the rest.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from implicit_diffusion.experiments.outcome import Picture
from implicit_diffusion.runs.files import replacing

CSS = Path(__file__).with_name("report.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(path: Path, title: str, body: Iterable[str]) -> Path:
    """Write a page in one step; `body` is HTML, the title plain text."""
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>
{CSS.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{"".join(body)}
</main>
</body>
</html>
"""
    with replacing(path) as file:
        file.write_text(page, encoding="utf-8")
    return path


def tile(label: str, value: str, note: str) -> str:
    """A headline number; all three are HTML."""
    return f'<div class="tile"><p>{label}</p><p class="value">{value}</p><p class="note">{note}</p></div>'


def figure(picture: Picture) -> str:
    """A picture with its title and caption."""
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return (
        f'<figure id="{escape(picture.name)}"><h2>{escape(picture.title)}</h2>'
        f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def table(columns: Iterable[str], rows: Iterable[Sequence[str]], chosen: int | None = None, cls: str = "") -> str:
    """Rows of plain text, the first cell of each its head; `chosen` is marked."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = []
    for index, (first, *cells) in enumerate(rows):
        mark = ' class="chosen"' if index == chosen else ""
        tds = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body.append(f'<tr{mark}><th scope="row">{escape(first)}</th>{tds}</tr>')
    found = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table class="{cls}">{found}</table></div>'


def duration(seconds: float) -> str:
    """Seconds up to two minutes, then minutes, then hours and minutes, as HTML."""
    if seconds < 120:
        return f"{seconds:.0f} <small>s</small>"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} <small>h</small> {minutes} <small>min</small>" if hours else f"{minutes} <small>min</small>"
