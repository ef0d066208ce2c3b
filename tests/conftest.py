import gc
import os
import signal
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: no test may ask the network
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["IMPLICIT_DIFFUSION_TRACEBACK"] = "1"  # an error that nobody expected is a failure, not a line
os.environ["IMPLICIT_DIFFUSION_CACHE"] = "off"  # no test may live on what another run left behind
# hypothesis looks up the constants of the code that it tests, and keeps them: not in the tree
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.path.join(tempfile.gettempdir(), "implicit-diffusion-hypothesis")

import jaxtyping
import pytest
import torch

from tests.helpers.checked_calls import checked

jaxtyping.jaxtyped = checked  # the import hook of its pytest plugin decorates the package with this
torch.set_num_threads(1)  # the test workers share the cores
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background of a shell begins without
drawing = True


def pytest_addoption(parser):
    parser.addoption(
        "--sketch", action="store_true", help="Save a dot for every picture, except where a test is `drawn`."
    )


def pytest_configure(config):
    """Layout and rasterising are half of a small run's time, and few tests are about pictures."""
    if not config.getoption("--sketch"):
        return
    from matplotlib.figure import Figure
    from PIL import Image

    savefig = Figure.savefig

    def sketch(figure, file, **options):
        if drawing:
            savefig(figure, file, **options)
        else:
            Image.new("RGB", (1, 1)).save(file, options["format"])

    Figure.savefig = sketch


def pytest_collection_finish(session):
    """What was collected stays to the end: no search for garbage need look at it (it was half of some tests' time)."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    global drawing
    drawing = item.get_closest_marker("drawn") is not None


@pytest.fixture
def as_users_run(monkeypatch):
    """The package without the run-time type checks of the tests: arguments of wrong types meet its own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
