"""The HTML page of a report: one file that needs neither network nor script.

Pictures are embedded, words of users are escaped, and a content security policy forbids everything else.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterable, Sequence
from html import escape
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from implicit_diffusion.commands.shared.formatting import DASH
from implicit_diffusion.files.atomic import replacing

CSS = Path(__file__).with_name("report.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Picture(NamedTuple):
    """A figure on disk: its name, its file, a title that serves as alternative text, and its caption."""

    name: str
    path: Path
    title: str
    caption: str


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
    below = f'<p class="note">{note}</p>' if note else ""
    return f'<div class="tile"><p>{label}</p><p class="value">{value}</p>{below}</div>'


def figures(pictures: Sequence[Picture]) -> str:
    """Pictures in two columns of nearly the same height; a narrow screen shows one column, in the order given.

    Browsers balance columns of few tall boxes badly, and may leave one empty. So the columns are chosen here: the first
    picture is on the left, the heights differ as little as possible; a single picture has all of the width.
    """
    if not pictures:
        return ""
    heights = [_height(picture) for picture in pictures]
    total, count = sum(heights), len(pictures)

    def uneven(left: tuple[int, ...]) -> float:
        return abs(total - 2 * sum(heights[i] for i in left))

    choices = [(0, *rest) for size in range(count) for rest in combinations(range(1, count), size)]
    left = min(choices, key=uneven) if count > 1 else (0,)
    columns = (left, tuple(i for i in range(count) if i not in left))
    boxes = ("".join(figure(pictures[i], i) for i in column) for column in columns if column)
    return f'<section class="figures">{"".join(f"<div>{box}</div>" for box in boxes)}</section>'


def _height(picture: Picture) -> float:
    """Height in widths of a column: the image, the caption at about 65 letters a line, title and padding."""
    width, height = struct.unpack(">II", picture.path.read_bytes()[16:24])  # of a PNG file
    return float(height / width + 0.043 * (3 + len(picture.caption) / 65))


def figure(picture: Picture, place: int = 0) -> str:
    """A picture with its title and caption; `place` among others is its order on a narrow screen."""
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return (
        f'<figure id="{escape(picture.name)}" style="order:{place}"><h2>{escape(picture.title)}</h2>'
        f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def table(columns: Iterable[str], rows: Iterable[Sequence[str]], chosen: int | None = None, cls: str = "") -> str:
    """Rows of plain text, the first cell of each its head; the row `chosen` is marked.

    No cell stays empty: a column without content is left out, and other empty cells become a dash.
    """
    names, rows = list(columns), [[cell or DASH for cell in row] for row in rows]
    kept = [i for i in range(len(names)) if i == 0 or not rows or any(row[i] != DASH for row in rows)]
    names, rows = [names[i] for i in kept], [[row[i] for i in kept] for row in rows]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = []
    for index, (first, *cells) in enumerate(rows):
        mark = ' class="chosen"' if index == chosen else ""
        tds = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body.append(f'<tr{mark}><th scope="row">{escape(first)}</th>{tds}</tr>')
    content = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table class="{cls}">{content}</table></div>'


def configuration(settings: Iterable[tuple[str, object]]) -> str:
    """The section, folded at first, with the options of a run by name."""
    rows = [[name, str(value) if isinstance(value, str | Path) else json.dumps(value)] for name, value in settings]
    return f"""<section><details><summary>Configuration</summary>
{table(("setting", "value"), rows, cls="plain")}</details></section>
"""


def duration(seconds: float) -> str:
    """Seconds up to two minutes, then minutes, then hours and minutes, as HTML."""
    if seconds < 120:
        return f"{seconds:.0f} <small>s</small>"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} <small>h</small> {minutes} <small>min</small>" if hours else f"{minutes} <small>min</small>"
