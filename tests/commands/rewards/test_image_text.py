"""clip:MODEL on the command line: how it is named, what it is given, and what its folder decides."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import training
from implicit_diffusion.commands.rewards import trust as reward_trust
from implicit_diffusion.commands.rewards.names import load_reward
from implicit_diffusion.commands.rewards.trust import Spelling, image_text_model, is_own, name_of_all, short, spelled
from implicit_diffusion.commands.shared.conditioning import Conditioning
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.image_text import load_image_text
from implicit_diffusion.reward_values import takes_condition
from tests.helpers import image_text, tiny
from tests.helpers.stops import interrupt_at


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("a:b (c)")
    image_text.clip(place / "my clip(2)")
    tiny.stable_diffusion(place / "sd")
    (place / "prompts.txt").write_text("a red cat\ndog\n")
    return place


@pytest.fixture
def folder(place, tmp_path):
    return shutil.copytree(place / "my clip(2)", tmp_path / "clip")


NAMES = {
    "clip:openai/clip-vit-base-patch32": ("openai/clip-vit-base-patch32", ""),
    "clip:folder": ("folder", ""),
    "clip:/a:b (c)/my clip(2)": ("/a:b (c)/my clip(2)", ""),
    'clip:/a:b (c)/my clip(2)(text="a (red) house: 3")': ("/a:b (c)/my clip(2)", '(text="a (red) house: 3")'),
    "clip:owner/name('a cat')": ("owner/name", "('a cat')"),
    "clip:folder()": ("folder", "()"),
    "clip:folder.py:f": ("folder.py:f", ""),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_have_a_model_and_arguments(name):
    model, call = NAMES[name]
    assert spelled(name) == Spelling("", f"clip:{model}", call)
    assert image_text_model(name) == model and not is_own(name) and name_of_all(name) is None


def test_other_names_are_what_they_were():
    for name in ("clips:f", "my/clip:f.py:g", "brightness", "clip.py:f"):
        assert image_text_model(name) is None
    assert is_own("clips:f") and name_of_all("brightness") == "brightness"


def test_folders_are_absolute_in_a_run_and_short_in_its_titles(place, monkeypatch):
    monkeypatch.chdir(place)
    name = reward_trust.absolute('clip:my clip(2)(text="a")')
    assert name == f'clip:{place}/my clip(2)(text="a")' and short(name) == 'clip:my clip(2)(text="a")'
    for hub in ("clip:owner/name", 'clip:owner/name(text="b")'):
        assert reward_trust.absolute(hub) == short(hub) == hub


def test_with_prompts_and_with_a_text(place):
    x = torch.rand(2, 3, 30, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    name = f"clip:{place}/my clip(2)"
    right = load_image_text(f"{place}/my clip(2)")
    prompted, fixed = load_reward(name), load_reward(f'{name}(text="a red cat")')
    assert takes_condition(prompted) and not takes_condition(fixed)
    assert torch.equal(prompted(x, ["a red cat", "dog"]), right(x, ["a red cat", "dog"]))
    assert torch.equal(fixed(x), right(x, ["a red cat"] * 2))
    for call in ('(words="a")', "(text=3)", '(text="")', '("a", "b")'):
        with pytest.raises(InvalidInputError, match="text"):
            load_reward(name + call)
    with pytest.raises(
        InvalidInputError, match="`reward` clip:no-such-folder: model: 'no-such-folder' is not a folder"
    ):
        load_reward("clip:no-such-folder")
    with pytest.raises(InvalidInputError, match=r"come without a condition.*clip:MODEL\(text="):
        Conditioning().of_states(prompted, None)
    with pytest.raises(InvalidInputError, match="give prompts, or one text for all images"):
        prompted(x, torch.arange(2))


SIZES = {"num-steps": 2, "batch": 2, "updates": 2, "starts": 4, "stride": 1, "guidance": 2, "lr": 1e-9, "kl-weight": 1}
RUN = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


@pytest.mark.slow
def test_a_run_depends_on_the_folder(place, folder, tmp_path, monkeypatch, capsys):
    """Its plan is not that of another model of this name, and a changed one does not continue it."""
    monkeypatch.chdir(tmp_path)
    reward = ["--reward", "clip:clip", "--prompts", str(place / "prompts.txt")]
    callbacks = training.callbacks
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "callbacks", lambda *arguments: [interrupt_at(1), *callbacks(*arguments)])
        assert main(["finetune", *RUN, "--model", str(place / "sd" / "model"), *reward, "--out", "run"]) == 130
    assert json.loads((tmp_path / "run" / "config.json").read_text())["reward"] == [f"clip:{folder}"]
    recorded = json.loads((tmp_path / "run" / "provenance.json").read_text())["inputs"]["reward"]
    assert recorded["folder"] == str(folder) and {"model.safetensors", "config.json"} <= recorded["files"].keys()
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"logit_scale": weights["logit_scale"] + 1}, folder / "model.safetensors", {"format": "pt"})
    assert main(["resume", "run"]) == 2
    error = capsys.readouterr().err
    assert "depends on what has changed" in error and "model.safetensors" in error and "reward" in error
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shutil.rmtree(folder)
    shutil.copytree(place / "my clip(2)", folder)
    assert main(["resume", "run"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["updates"] == 2
    assert "clip:clip" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("option", ["reward", "judge"])
def test_a_model_that_is_not_there_is_not_called_the_model_that_is_trained(option, tmp_path, capsys):
    assert main(["finetune", f"--{option}", "clip:nowhere", "--out", str(tmp_path / "run")]) == 2
    assert f"--{option} clip:nowhere: 'nowhere' is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
