"""The page of an unfinished run: how far it has come. It says so, and is not the run's report."""

from __future__ import annotations

import shlex
import tempfile
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from implicit_diffusion.commands.reporting.comparison import Run, number_cell
from implicit_diffusion.commands.reporting.curves import draw_courses
from implicit_diffusion.commands.shared.page import configuration, figures, table, write_page


def write_so_far(run: Run, page: Path) -> Path:
    """Write the page of an unfinished run; nothing of the run's own is touched."""
    title = f"Unfinished, after {run.progress}"
    with tempfile.TemporaryDirectory() as folder:
        pictures = figures(draw_courses({"": run.course}, Path(folder)))
        body = [_headline(run, title), _card(run), _numbers(run), pictures, configuration(run.files.options.items())]
        return write_page(page, f"{run.path.absolute().name} – unfinished", body)


def _headline(run: Run, title: str) -> str:
    facts = [str(run.path.absolute()), f"implicit-diffusion {run.files.origin.version}"]
    return f"""<header>
<p class="kicker">implicit-diffusion · {escape(run.course.kind)} · not a report: the run is unfinished</p>
<h1>{escape(title)}</h1>
<p class="facts">{escape(" · ".join(facts))}</p>
</header>
"""


def _card(run: Run) -> str:
    quoted = shlex.quote(str(run.path.absolute()))
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    last = f"The last line of metrics.jsonl is of {run.written}" if run.files.lines else "There is no line of metrics"
    return f"""<section class="concerns"><div class="concern warning">
<p><b>This run is unfinished.</b> {escape(last)}; this page was made at {now} UTC and does not change. The run may still
be training, or being judged, or it was interrupted.</p>
<p>A newer page: <code>implicit-diffusion report {escape(quoted)}</code><br>
An interrupted run continues with <code>implicit-diffusion resume {escape(quoted)}</code></p>
</div></section>
"""


def _numbers(run: Run) -> str:
    rows = [[label, number_cell(number)] for label, number in run.course.numbers.items()]
    if not rows:
        return ""
    return f"""<section><h2>Numbers so far</h2>
<p>{escape(run.course.so_far)} Every ± is one standard error.</p>
{table(("", "value"), rows)}</section>
"""
