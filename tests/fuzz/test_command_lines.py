"""Three hundred random command lines: each does its work, or is refused in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from implicit_diffusion.commands.registry import COMMANDS
from tests.fuzz.command_lines import bases

ROOT = Path(__file__).parents[2]


def test_there_is_a_valid_line_of_every_command():
    assert bases().keys() == COMMANDS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_every_command_line_ends_with_a_result_or_a_line(seed):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.command_lines", str(seed), "50"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
