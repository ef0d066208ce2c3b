"""docs/architecture.md shows the floors that test_architecture.py enforces."""

import re

from tests.helpers.floor_map import PAGE, command_map, floor_map, with_map


def test_the_page_shows_the_floors_of_the_test():
    page = PAGE.read_text(encoding="utf-8")
    assert floor_map() in page, "run `python -m tests.helpers.floor_map`"
    assert command_map() in page, "run `python -m tests.helpers.floor_map`"
    assert with_map(page) == page


def test_every_room_has_a_line():
    rooms = re.findall(r"^\| \d* \| `(\w+)` \| \S", floor_map(), re.MULTILINE)
    assert len(rooms) == len(set(rooms)) > 20
    assert {"tables", "objectives", "gradients", "loops", "runs", "commands"} <= set(rooms)
    assert {"finetune", "ebm", "shared", "registry"} <= set(re.findall(r"`(\w+)`", command_map()))
