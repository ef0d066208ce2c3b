"""The floor maps of docs/architecture.md, made from the tables that the architecture test enforces.

`python -m tests.helpers.floor_map` writes them into the page; `tests/test_architecture_page.py` compares.
"""

import ast
import re
from pathlib import Path

from tests.test_architecture import ARROWS, COMMAND_FLOORS, FLOORS, SOURCE

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
MARKED = re.compile(r"(<!-- floors: begin -->\n).*?(<!-- floors: end -->)", re.DOTALL)


def first_line(room):
    """The first paragraph of a room's docstring."""
    folder = SOURCE / room
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert docstring, f"{file} needs a docstring: the floor map shows its first line"
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", r"\|").replace("*", r"\*")


def floor_map():
    """A table, the top floor first: number of the floor, room, first line of its docstring."""
    lines = ["| floor | room | |", "|---|---|---|"]
    for level, rooms in reversed(list(enumerate(FLOORS))):
        for place, room in enumerate(sorted(rooms)):
            lines.append(f"| {level if place == 0 else ''} | `{room}` | {first_line(room)} |")
    return "\n".join(lines)


def command_map():
    """The same inside `commands`, with the rooms that each floor imports besides `shared`."""
    lines = ["| floor of `commands` | rooms | import, besides `shared` |", "|---|---|---|"]
    for level, rooms in reversed(list(enumerate(COMMAND_FLOORS))):
        names = ", ".join(f"`{room}`" for room in sorted(rooms - {"__init__"}))
        arrows = ", ".join(f"`{room}` → `{other}`" for room, other in sorted(ARROWS) if room in rooms)
        lines.append(f"| {level} | {names} | {arrows} |")
    return "\n".join(lines)


def with_map(page):
    """The text of the page with the present maps between its marks."""
    return MARKED.sub(lambda marks: f"{marks.group(1)}\n{floor_map()}\n\n{command_map()}\n\n{marks.group(2)}", page)


if __name__ == "__main__":
    PAGE.write_text(with_map(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
