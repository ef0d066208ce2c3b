import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: no test may ask the network
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["IMPLICIT_DIFFUSION_CACHE"] = "off"  # no test may live on what another run left behind

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)  # the test workers share the cores


@pytest.fixture
def as_users_run(monkeypatch):
    """The package without the run-time type checks of the tests: arguments of wrong types meet its own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
