"""What is said of contents that do not fit, and what is not theirs to explain."""

from pathlib import Path

import pytest

from implicit_diffusion.errors import InvalidInputError, ProcessError
from implicit_diffusion.files.foreign import consistent, of_another

RUN = Path("run")


def test_what_does_not_fit_names_its_folder():
    with pytest.raises(InvalidInputError, match=r"run cannot be used: .* \(KeyError: 'loop'\)"), consistent(RUN):
        {}["loop"]
    with pytest.raises(InvalidInputError, match=r"^run does not fit this run: 3$"), consistent(RUN, of_another):
        raise IndexError(3)


@pytest.mark.parametrize("error", [ProcessError("another process has ended"), RuntimeError("CUDA out of memory")])
def test_neither_lost_processes_nor_lack_of_memory_are_its_fault(error):
    """Both are runtime errors, as a state of other shapes is."""
    with pytest.raises(type(error), match=str(error)), consistent(RUN, of_another):
        raise error
