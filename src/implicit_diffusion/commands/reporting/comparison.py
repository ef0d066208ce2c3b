"""Several runs of one command on one page: their numbers and curves side by side, and the options that differ."""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from implicit_diffusion.commands.reporting.course import Course, Files, Number
from implicit_diffusion.commands.reporting.curves import draw_courses
from implicit_diffusion.commands.shared.formatting import number
from implicit_diffusion.commands.shared.page import configuration, figures, table, write_page
from implicit_diffusion.showing import Shown

NOT_COMPARED = ("out", "track")  # options that say nothing of the numbers
COUNTS = 1e15  # whole numbers up to here are written out


@dataclass(frozen=True, repr=False)
class Run(Shown):
    """A run, finished or not."""

    files: Files
    course: Course

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.files.directory.path

    @property
    def progress(self) -> str:
        """How far it has come, in words."""
        lines = self.course.lines
        if any("arm" in line for line in lines):
            count = len({json.dumps([line.get(name) for name in ("arm", "seed", "kl_weight")]) for line in lines})
            return f"{count} training{'s' * (count != 1)}"
        updates = max((line["updates"] for line in lines if isinstance(line.get("updates"), int)), default=0)
        total = self.course.total
        return f"update {updates}" + ("" if total is None else f" of {total}")

    @property
    def written(self) -> str:
        """When the last line of its metrics was written."""
        return "—" if self.files.written is None else f"{self.files.written:%Y-%m-%d %H:%M:%S} UTC"


def write_comparison(runs: Sequence[Run], page: Path) -> Path:
    """Write the page.

    Args:
        runs: of one kind, two or more.
        page: the file.
    """
    letters = _letters(len(runs))
    names = {f"{letter}  {name}": run.course for letter, name, run in zip(letters, _short(runs), runs)}
    title = f"{len(runs)} runs of {runs[0].course.kind}"
    with tempfile.TemporaryDirectory() as folder:
        body = [
            _headline(runs, title),
            f'<section class="concerns">{"".join(_cards(runs, letters))}</section>',
            _which(runs, letters),
            _numbers(runs, letters),
            figures(draw_courses(names, Path(folder))),
            _differing(runs, letters),
            configuration((name, runs[0].files.options[name]) for name in _options(runs, differing=False)),
        ]
        return write_page(page, title, body)


def number_cell(value: Number | None) -> str:
    """A number with its error; a count in full."""
    if value is None:
        return ""
    if value.error is None and value.value == int(value.value) and abs(value.value) < COUNTS:
        return f"{int(value.value):,}".replace("-", "−")
    return number(value.value, value.error)


def _headline(runs: Sequence[Run], title: str) -> str:
    finished = sum(run.files.finished for run in runs)
    facts = f"{finished} finished, {len(runs) - finished} unfinished"
    return f"""<header>
<p class="kicker">implicit-diffusion · comparison</p>
<h1>{escape(title)}</h1>
<p class="facts">{escape(facts)}</p>
</header>
"""


def _cards(runs: Sequence[Run], letters: Sequence[str]) -> Iterator[str]:
    """What to know before two numbers are compared."""
    differing = _options(runs, differing=True)
    defining = [name for name in runs[0].course.defining if name in differing]
    if defining:
        what = " and ".join(f"--{name.replace('_', '-')}" for name in defining)
        yield (
            '<div class="concern warning"><p><b>Their numbers are not of the same thing.</b> '
            f"These runs have different {escape(what)}: that a number is larger may mean nothing.</p></div>"
        )
    unfinished = [letter for letter, run in zip(letters, runs) if not run.files.finished]
    if unfinished:
        yield (
            f'<div class="concern warning"><p><b>Unfinished: {", ".join(unfinished)}.</b> '
            f"{escape(runs[0].course.so_far)} The page does not change while they continue.</p></div>"
        )
    if len({run.files.origin.version for run in runs}) > 1:
        yield '<div class="concern info"><p>The runs are of different versions of this library.</p></div>'


def _which(runs: Sequence[Run], letters: Sequence[str]) -> str:
    rows = [
        [
            letter,
            str(run.path),
            "finished" if run.files.finished else "unfinished",
            run.progress,
            run.written,
            run.files.origin.version,
        ]
        for letter, run in zip(letters, runs)
    ]
    columns = ("", "folder", "state", "progress", "last line of metrics", "version")
    return f"<section><h2>The runs</h2>\n{table(columns, rows, cls='plain')}</section>\n"


def _numbers(runs: Sequence[Run], letters: Sequence[str]) -> str:
    labels = list(dict.fromkeys(label for run in runs for label in run.course.numbers))
    rows = [[label, *(number_cell(run.course.numbers.get(label)) for run in runs)] for label in labels]
    if not rows:
        return ""
    note = runs[0].course.note if any(run.files.finished for run in runs) else ""
    return f"""<section><h2>Numbers</h2>
<p>{escape(note)} Every ± is one standard error; a dash stands for what is not known.</p>
{table(("", *letters), rows)}</section>
"""


def _differing(runs: Sequence[Run], letters: Sequence[str]) -> str:
    rows = [[name, *(_value(run, name) for run in runs)] for name in _options(runs, differing=True)]
    if not rows:
        return "<section><h2>Options that differ</h2>\n<p>None: all options agree.</p></section>\n"
    return f"""<section><h2>Options that differ</h2>
<p>All other options agree; they are below.</p>
{table(("", *letters), rows)}</section>
"""


def _options(runs: Sequence[Run], *, differing: bool) -> list[str]:
    """Names of options that differ between the runs, or that do not."""
    names = dict.fromkeys(name for run in runs for name in run.files.options if name not in NOT_COMPARED)
    return [name for name in names if (len({_value(run, name) for run in runs}) > 1) is differing]


def _value(run: Run, name: str) -> str:
    if name not in run.files.options:
        return ""
    value = run.files.options[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(runs: Sequence[Run]) -> list[str]:
    """The last parts of their paths, as few as make them differ."""
    parts = [run.path.absolute().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _letters(count: int) -> list[str]:
    """A, B, C, …"""
    return list(string.ascii_uppercase[:count])
