"""`--track` on commands that train: the same numbers to the bit, the lines of the run, pictures at fixed noise."""

import pytest
from diffusers import DDPMScheduler

from implicit_diffusion import cli
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.models.pretrained import save_pipeline
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.callbacks.track import due
from implicit_diffusion.runs.trackers.tracking import series
from tests.helpers import tiny
from tests.helpers.tracked import of_tensorboard

pytestmark = pytest.mark.slow
COMMANDS = {
    "finetune": "--model MODEL --reward redness --kl-weight 2 --num-steps 3 --batch 2 --updates 4 --starts 4 --ema 0.5",
    "pretrain": "--steps 5 --batch 4 --channels 8 8 --chains 2 --samples 16",
    "ebm": "--steps 6 --particles 16 --judge-steps 2 --width 8",
    "tilt": "--model ENERGY --kl-weights 1 --steps 3 --particles 16 --seeds 2",
    "hexagon": "--steps 10 --particles 16 --seeds 1 --tune --grid 0.1",
}
CLOCKS = {"seconds"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    unet = tiny.unet(in_channels=3, out_channels=3, **tiny.PLAIN)
    save_pipeline(folder / "MODEL", DiffusersDenoiser(unet), DDPMScheduler(clip_sample=False), "a test")
    assert cli.main(["ebm", *COMMANDS["ebm"].split(), "--out", str(folder / "ENERGY-run")]) == 0
    return {"MODEL": str(folder / "MODEL"), "ENERGY": str(folder / "ENERGY-run" / "model")}


def lines_of(directory):
    """The lines, without what a clock says."""
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in directory.read_metrics()]


def weights_of(folder):
    return {file.name: file.read_bytes() for file in sorted((folder / "model").rglob("*.safetensors"))}


@pytest.mark.parametrize("name", COMMANDS)
def test_tracking_changes_no_number_and_shows_all_of_them(name, models, tmp_path):
    words = [name, *(models.get(word, word) for word in COMMANDS[name].split())]
    runs = {}
    for side, track in (("off", []), ("on", ["--track", "tensorboard"])):
        runs[side] = RunDirectory(tmp_path / side)
        assert cli.main([*words, "--out", str(tmp_path / side), *track]) == 0
    on, off = runs["on"], runs["off"]
    assert lines_of(on) == lines_of(off) and len(lines_of(on)) > 1
    assert weights_of(on.path) == weights_of(off.path)
    assert not (off.path / "tensorboard").exists()
    scalars, pictures = of_tensorboard(on.path / "tensorboard")
    shown = [one for line in on.read_metrics() for one in series(line)]
    for step, group, numbers in shown:
        for number, value in numbers.items():
            assert (step, pytest.approx(value, rel=1e-6)) in scalars[f"{group}/{number}" if group else number]
    assert sum(map(len, scalars.values())) == sum(len(numbers) for _, _, numbers in shown)
    total = {"finetune": 4, "pretrain": 5, "ebm": 6}.get(name)
    if total is not None:
        (steps,) = pictures.values()
        assert steps == [n for n in range(total + 1) if due(n, total)]
    else:  # particles of the first seed of every arm, where a run keeps them
        assert len(pictures) == {"tilt": 1, "hexagon": 9}[name]
    assert cli.main(["report", str(off.path), str(on.path), "--out", str(tmp_path / "page.html")]) == 0
    assert "None: all options agree." in (tmp_path / "page.html").read_text()
