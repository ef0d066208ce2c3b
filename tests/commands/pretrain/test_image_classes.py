"""Class-conditional pretraining: labels that belong to their images, a network that uses them, names that are kept."""

import json
import signal

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from safetensors.torch import load_file

from implicit_diffusion import digits
from implicit_diffusion.cli import main
from implicit_diffusion.commands.pretrain import command as pretrain
from implicit_diffusion.commands.pretrain import training
from implicit_diffusion.commands.pretrain.config import Config
from implicit_diffusion.commands.pretrain.images import classes as image_classes
from implicit_diffusion.commands.pretrain.images.loading import as_floats, load_images
from implicit_diffusion.commands.pretrain.samples import TITLE, WIDTH, plot_samples, sample_images
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.pretrained import load_pretrained

SIDES = {"left": np.s_[:, :4], "right": np.s_[:, 4:], "t*p": np.s_[:4]}  # what is white in the images of a class
NAMES = tuple(SIDES)
WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"
WORDS = ["--classes", "--channels", "16", "16", "--batch", "16", "--chains", "4"]


def pattern(side):
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[side] = 255
    return pixels


PATTERNS = torch.from_numpy(np.stack([pattern(side) for side in SIDES.values()]))[:, None]


def halves(folder, count=8):
    """Images that are half white, in a folder for each class, some of them deeper below."""
    for name, side in SIDES.items():
        for i in range(count):
            place = folder / name / ("train" if i % 2 else ".")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pattern(side)).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A run, long enough to learn what a class looks like."""
    place = tmp_path_factory.mktemp("classes")
    data, out = halves(place / "halves"), place / "run"
    words = ["--steps", "100", "--lr", "1e-2", "--ema-decay", "0.9", "--dropout", "0"]
    assert main(["pretrain", "--data", str(data), *WORDS, *words, "--out", str(out)]) == 0
    return out


def test_every_image_keeps_its_class(tmp_path):
    images = load_images(str(halves(tmp_path / "halves")), classes=True)
    assert images.classes == NAMES  # in their order
    for part, labels in ((images.train, images.train_labels), (images.held_out, images.held_out_labels)):
        assert torch.equal(part, PATTERNS[labels])
    plain = load_images(str(tmp_path / "halves"))
    assert torch.equal(plain.train, images.train) and plain.train_labels is None and plain.classes == ()


def test_the_digits_have_their_labels():
    images, real = load_images("digits", classes=True), digits.load_digits()
    assert images.classes == tuple("0123456789")
    assert torch.equal(images.train_labels, real.train_labels)
    assert torch.equal(images.held_out_labels, real.held_out_labels)
    assert load_images("digits").train_labels is None


def test_subfolders_that_are_not_used_are_mentioned(tmp_path, capsys):
    folder = halves(tmp_path / "halves")
    load_images(str(folder))
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("classes")] == [
        "classes   the 3 subfolders (left, right, t*p) are not used as classes: the model does not distinguish them; "
        "--classes conditions it on them"
    ]
    load_images(str(folder), classes=True)
    load_images(str(folder / "left"))
    assert "classes" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("one", r"its subfolders with images, and it has 1; put"),
        ("flat", r"its subfolders with images, and it has none; put"),
        ("outside", r"1 images of .* lie in no subfolder, so that they have no class: 'x.png'; move"),
        ("rare", r"no image is left to train on, when some are held out, of rare"),
        ("blind", r"--channels 8 8 .* cannot see classes"),
        ("ylecun/mnist", r"not for ylecun/mnist of the hub"),
    ],
)
def test_classes_that_are_not_there_are_refused(data, message, tmp_path):
    image = Image.fromarray(np.zeros((8, 8), dtype=np.uint8))
    halves(tmp_path / "outside")
    image.save(tmp_path / "outside" / "x.png")
    held_out = int(torch.randperm(20, generator=torch.Generator().manual_seed(0))[0])
    rare = ["a"] * held_out + ["rare"] + ["z"] * (19 - held_out)
    for folder, names in {"one": ["a", "a"], "flat": [".", "."], "rare": rare}.items():
        for i, name in enumerate(names):
            (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / folder / name / f"{i}.png")
    with pytest.raises(InvalidInputError, match=message):
        Config(classes=True, channels=(8, 8) if data == "blind" else None).check()
        load_images(data if "/" in data else str(tmp_path / data), classes=True)


def nearest(images):
    """The class whose images a sample is nearest to."""
    return torch.cdist(images.flatten(1), as_floats(PATTERNS).flatten(1)).argmin(1)


@pytest.mark.slow
def test_a_sample_looks_like_its_class(learnt):
    pretrained = load_pretrained(learnt / "model")
    assert pretrained.condition == "classes" and pretrained.num_classes == 3
    x = sample_images(pretrained.denoiser.model, pretrained.scheduler, 4, 30, 0, (1, 8, 8), 3)
    assert torch.equal(nearest(x), image_classes.in_turn(3, 30))


@pytest.mark.slow
def test_what_comes_out_is_sampled_and_fine_tuned_as_it_is(learnt, tmp_path):
    sizes = ["--num-steps", "2", "--starts", "4", "--plan", "--out", str(tmp_path / "plan")]
    assert main(["finetune", "--model", str(learnt / "model"), *sizes]) == 0
    grid = ["--num", "6", "--num-steps", "4", "--out", str(tmp_path / "grid.png")]
    assert main(["sample", "--model", str(learnt / "model"), *grid]) == 0
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "grid.png").convert("L")))
    tiles = pixels.view(2, 8, 8, 3, 8, 8)[:, :, 0, :, :, 0].permute(0, 2, 1, 3).reshape(6, 8, 8)  # eight times enlarged
    assert nearest(as_floats(tiles)).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.slow
def test_the_names_of_the_classes_are_kept(learnt):
    summary = json.loads((learnt / "summary.json").read_text())
    assert summary["images"]["classes"] == list(NAMES) and summary["config"]["classes"] is True
    card = (learnt / "model" / "README.md").read_text()
    assert "| 1 | right |\n| 2 | t\\*p |" in card and "--data DATA --classes --size" in card
    code = card.split("```python\n")[1].split("```")[0].replace('"this folder"', repr(str(learnt / "model")))
    scope = {}
    exec(code.replace("set_timesteps(50)", "set_timesteps(2)"), scope)
    assert scope["x"].shape == (3, 1, 8, 8) and scope["x"].isfinite().all()


def test_the_picture_has_a_row_for_each_class():
    images = torch.arange(30.0).view(30, 1, 1, 1)
    rows = image_classes.by_class(images, image_classes.in_turn(2, 30), 2).flatten().view(2, image_classes.COLUMNS)
    assert rows.tolist() == [list(range(0, 24, 2)), list(range(1, 25, 2))]
    few = image_classes.by_class(images[:3], torch.tensor([0, 2, 0]), 3).flatten().view(3, -1)
    assert few[:, :3].tolist() == [[0, 2, -1], [-1, -1, -1], [1, -1, -1]]


@pytest.mark.slow
def test_digits_with_classes_say_so_in_their_card(tmp_path):
    config = Config(steps=2, batch=4, channels=(8, 16), samples=8, chains=(2,), classes=True, out=tmp_path / "run")
    pretrain.run(config)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "pretrain --data digits --classes --out DIR" in card and "tags: [class-conditional-image" in card
    assert "| 9 | 9 |" in card and "class_labels=labels" in card


@pytest.mark.slow
def test_an_interrupted_run_with_classes_goes_on_bit_for_bit(tmp_path, monkeypatch):
    data = halves(tmp_path / "halves", count=3)
    call = ["pretrain", "--data", str(data), *WORDS, "--steps", "3"]
    assert main([*call, "--out", str(tmp_path / "whole")]) == 0
    original, count = training.image_losses, iter(range(100))

    def loss(*arguments, **options):
        if next(count) == 1:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(training, "image_losses", loss)
        assert main([*call, "--out", str(tmp_path / "run")]) == 130
    assert main(["resume", str(tmp_path / "run")]) == 0
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("run", "whole"))
    assert ours.keys() == theirs.keys() and "class_embedding.weight" in ours
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.drawn
@pytest.mark.parametrize("names", [("a", "b"), tuple("abcdefghij")])
def test_a_picture_is_as_high_as_its_rows(names, tmp_path):
    """Images of two by three in frames of one: rows of 12 x 5 by 4 pixels each."""
    count = image_classes.COLUMNS * len(names)
    plot_samples({"real": torch.zeros(count, 1, 2, 3)}, tmp_path / "x.png", names)
    height, width = imread(tmp_path / "x.png").shape[:2]
    assert height / 130 == pytest.approx(WIDTH * 4 * len(names) / 60 + TITLE, abs=0.02) and width == 130 * WIDTH
