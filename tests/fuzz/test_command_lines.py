"""Three hundred random command lines: each trains and resumes to the bit, or is refused in one line."""

import os
from collections import Counter

import pytest
from hypothesis import given

from implicit_diffusion.commands.registry import COMMANDS
from tests.fuzz.command_lines import BASES, clear, lines, prepare, verdict
from tests.fuzz.test_api_calls import DETERMINED, EXAMPLES

RESUMED = 0.2  # the least share of examples that train, and are interrupted and resumed


def test_there_is_a_valid_line_of_every_command():
    assert BASES.keys() == COMMANDS.keys()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each line runs in a fork")
def test_every_command_line_resumes_to_the_bit_or_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    kept, seen, wholes = {path.name for path in tmp_path.iterdir()}, Counter(), {}

    @DETERMINED
    @given(lines())
    def holds(line):
        try:
            seen[verdict(line, tmp_path, wholes)] += 1
        finally:
            clear(tmp_path, kept)

    holds()
    print(seen)
    assert sum(seen.values()) >= EXAMPLES and seen["resumed"] >= RESUMED * EXAMPLES, seen
