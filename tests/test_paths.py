"""Where a path is taken, a string and any path do, `~` is the home folder, and what is neither is refused in a line."""

import os
from pathlib import Path

import pytest
import torch

from implicit_diffusion.commands.finetune import config as finetune_config
from implicit_diffusion.commands.resuming import report, resume
from implicit_diffusion.commands.shared.inputs import absolute
from implicit_diffusion.commands.shared.prompt_files import read_prompts
from implicit_diffusion.denoisers.gaussian import GaussianDenoiser
from implicit_diffusion.errors import InvalidInputError, check_path
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.loops import Nested
from implicit_diffusion.models.checkpoints import DIGITS, find_checkpoint
from implicit_diffusion.models.energy_model import load_energy_model
from implicit_diffusion.models.pretrained import load_pretrained, save_pipeline
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.fit import fit
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.ornstein_uhlenbeck import ou_reverse_sde


class Place:
    """A path of another library."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


FORMS = {
    "string": lambda home: str(home / "there"),
    "path": lambda home: home / "there",
    "any path": lambda home: Place(home / "there"),
    "home": lambda home: "~/there",
    "path from home": lambda home: Path("~/there"),
}


def trained(directory):
    net = GaussianDenoiser.ornstein_uhlenbeck(torch.zeros(2), 0.5)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    chain = Chain(net, ou_reverse_sde(2, 2.0), (2,))
    fit(Nested(chain, Reward(lambda x: x[:, 0]), sgd, batch=2, noise=Noise(0)), 1, directory=directory)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_path_is_the_same_place(form, home):
    place, there = FORMS[form](home), home / "there"
    assert check_path("folder", place) == there
    save_state(place, {"k": 1})
    assert load_state(place) == load_state(there) == {"k": 1}
    for name in ("state.safetensors", "manifest.json"):
        (there / name).unlink()
    assert RunDirectory.create(place) == RunDirectory(place) == RunDirectory(there)
    assert RunDirectory(place).path == there
    trained(place)
    assert len(RunDirectory(there).read_metrics()) == 1
    with pytest.raises(InvalidInputError, match=f"`path` {there} exists and is not empty"):
        RunDirectory.check(place)
    config = finetune_config.Config()
    object.__setattr__(config, "out", place)  # as it is where nobody checks annotations
    assert absolute(config).out == there
    for job in (resume, report):
        with pytest.raises(InvalidInputError, match=str(there)):
            job(place)
    with pytest.raises(InvalidInputError, match=f"{there} holds no"):
        load_energy_model(place)
    (home / "prompts.txt").write_text("a red square\n")
    (there / "config.json").unlink(missing_ok=True)
    assert sorted(os.listdir(home)) == ["prompts.txt", "there"]  # and no folder called ~


@pytest.mark.parametrize("form", FORMS)
def test_models_and_prompts(form, home):
    (home / "there").symlink_to(DIGITS)
    place = FORMS[form](home)
    assert find_checkpoint(place).folder == home / "there"
    (home / "there").unlink()
    (home / "there").write_text("a red square\n")
    assert read_prompts(place) == ["a red square"]


def test_a_pipeline_is_saved_where_a_string_says(home):
    digits = load_pretrained("digits")
    assert save_pipeline("~/model", digits.denoiser, digits.scheduler, "card") == home / "model"
    assert load_pretrained("~/model").event_shape == (1, 8, 8)


@pytest.mark.parametrize("bad", [None, 3, b"there", "", ["there"], torch.zeros(2)])
def test_what_is_no_path_is_refused(bad):
    with pytest.raises(InvalidInputError, match=r"path must be a path, a string or a pathlib.Path, got"):
        check_path("path", bad)


def test_an_empty_string_is_no_folder():
    """It would be the working directory."""
    calls = [RunDirectory, RunDirectory.create, RunDirectory.check, load_state, resume, report, read_prompts]
    for call in [*calls, load_energy_model, lambda folder: save_state(folder, {}), find_checkpoint]:
        with pytest.raises(InvalidInputError, match=r"path|is not a folder"):
            call("")


def test_a_home_that_nobody_has_is_refused():
    with pytest.raises(InvalidInputError, match="names a home folder that is not known"):
        RunDirectory("~nobody-of-this-name/run")
