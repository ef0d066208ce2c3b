"""Images from folders and the hub: sizes, channels, splits, refusals; a model pretrained on them fine-tunes."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from implicit_diffusion.cli import main
from implicit_diffusion.commands.pretrain import command as pretrain
from implicit_diffusion.commands.pretrain.images import loading as data
from implicit_diffusion.commands.pretrain.images.loading import as_floats, load_images
from implicit_diffusion.commands.pretrain.network import Network, fitting_size, levels_for, widths_for
from implicit_diffusion.commands.rewards.names import load_reward
from implicit_diffusion.errors import InvalidInputError, MemoryLimitError
from implicit_diffusion.models.pretrained import load_pretrained


def write_images(folder, count=12, size=(16, 12), mode="RGB", seed=0):
    """Smooth random pictures, height × width."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        shape = (*size, 3) if mode == "RGB" else size
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels, mode=mode if mode != "L" else None).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("height", "width", "levels", "widths", "size"),
    [
        (8, 8, 2, (24, 48), (8, 8)),
        (16, 12, 2, (32, 64), (16, 12)),
        (16, 16, 3, (32, 64, 64), (16, 16)),
        (28, 28, 3, (64, 128, 128), (28, 28)),  # MNIST
        (32, 32, 4, (64, 128, 128, 128), (32, 32)),  # CIFAR-10
        (64, 96, 5, (64, 128, 128, 128, 128), (64, 96)),
        (5, 9, 2, (24,), (4, 8)),
        (30, 45, 3, (64, 128, 128), (32, 44)),
        (31, 36, 3, (64, 128, 128), (32, 36)),
    ],
)
def test_the_rule_of_sizes(height, width, levels, widths, size):
    assert levels_for(height, width) == levels
    if (height, width) == size:
        assert widths_for(height, width) == widths
    assert fitting_size(height, width) == size
    multiple = 2 ** (len(widths_for(*size)) - 1)
    assert size[0] % multiple == size[1] % multiple == 0


def test_a_folder_keeps_pixels_channels_and_shape(tmp_path):
    folder = write_images(tmp_path / "faces")
    images = load_images(str(folder))
    assert images.name == "faces" and images.event_shape == (3, 16, 12)
    assert len(images.train) == 11 and len(images.held_out) == 1 and images.train.dtype == torch.uint8
    files = {tuple(np.asarray(Image.open(f)).transpose(2, 0, 1).ravel()) for f in folder.iterdir()}
    assert {tuple(x.flatten().tolist()) for x in torch.cat([images.train, images.held_out])} == files
    again = load_images(str(folder))
    assert torch.equal(images.held_out, again.held_out)
    floats = as_floats(images.train)
    assert floats.min() >= -1 and floats.max() <= 1 and as_floats(floats) is floats


def test_grey_folders_have_one_channel_unless_one_image_is_in_colour(tmp_path):
    folder = write_images(tmp_path / "grey", mode="L")
    assert load_images(str(folder)).event_shape == (1, 16, 12)
    write_images(folder / "one", count=1, seed=1)
    assert load_images(str(folder)).event_shape == (3, 16, 12)


def test_sizes_are_brought_to_what_the_network_can_halve(tmp_path, capsys):
    folder = write_images(tmp_path / "odd", size=(30, 45), count=3)
    assert load_images(str(folder)).event_shape == (3, 32, 44)
    assert "30×45 pixels are brought to 32×44" in capsys.readouterr().out
    assert load_images(str(folder), size=(8, 8)).event_shape == (3, 8, 8)
    assert load_images(str(folder), size=(9, 9), levels=3).event_shape == (3, 8, 8)
    write_images(folder / "more", size=(10, 10), count=2, seed=1)
    with pytest.raises(InvalidInputError, match=r"several sizes.*--size HEIGHT WIDTH"):
        load_images(str(folder))
    assert load_images(str(folder), size=(16, 16)).event_shape == (3, 16, 16)


def test_what_is_no_data(tmp_path, monkeypatch):
    with pytest.raises(InvalidInputError, match="neither 'digits' nor 'fashion-mnist', nor a folder"):
        load_images("letters")
    with pytest.raises(InvalidInputError, match="holds no images that can be read"):
        (tmp_path / "empty").mkdir()
        load_images(str(tmp_path / "empty"))
    with pytest.raises(InvalidInputError, match="holds 1 image"):
        load_images(str(write_images(tmp_path / "one", count=1)))
    with pytest.raises(InvalidInputError, match="at least 4 pixels"):
        load_images(str(tmp_path / "one"), size=(2, 2))
    with pytest.raises(InvalidInputError, match="8 by 8"):
        load_images("digits", size=(16, 16))
    deep = tmp_path / "deep"
    deep.mkdir()
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(deep / "a.png")
    with pytest.raises(InvalidInputError, match="more than eight bits"):
        load_images(str(deep))
    broken = write_images(tmp_path / "broken", count=2)
    (broken / "00.png").write_bytes((broken / "00.png").read_bytes()[:60])
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load_images(str(broken))
    many = write_images(tmp_path / "many", count=2)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10}))
    with pytest.raises(MemoryLimitError, match="smaller --size"):
        load_images(str(many))


def test_a_hub_id_without_a_network_is_one_clear_line_in_seconds(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def unreachable(self, *arguments, timeout=None, **options):
        assert timeout == data.HUB_TIMEOUT
        raise OSError("Network is unreachable")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    start = time.perf_counter()
    with pytest.raises(InvalidInputError, match=r"'ylecun/mnist' cannot be loaded.*unreachable.*HF_HUB_OFFLINE=1"):
        load_images("ylecun/mnist")
    assert time.perf_counter() - start < 10


def test_the_cache_alone_is_asked_offline():
    with pytest.raises(InvalidInputError, match="'ylecun/mnist' cannot be loaded"):
        load_images("ylecun/mnist")  # the tests run under HF_HUB_OFFLINE=1


def test_hub_data_sets_are_told_by_their_features(monkeypatch, tmp_path):
    """MNIST calls its column image, CIFAR-10 img; the split is train."""
    import datasets
    import huggingface_hub

    pixels = [Image.fromarray(np.full((28, 28), i, dtype=np.uint8)) for i in range(4)]
    columns = {"label": list(range(4)), "img": pixels}
    features = datasets.Features({"label": datasets.Value("int64"), "img": datasets.Image()})
    split = datasets.Dataset.from_dict(columns, features=features)
    splits = datasets.DatasetDict({"test": split.select([0]), "train": split})
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)
    images = load_images("ylecun/mnist")
    assert images.name == "mnist" and images.event_shape == (1, 28, 28) and len(images.train) == 3
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": split.select_columns(["label"])})
    with pytest.raises(InvalidInputError, match="no column of images; its columns are label"):
        load_images("ylecun/mnist")


def test_redness():
    redness = load_reward("redness")
    red, grey, blue = (
        torch.tensor(rgb).view(1, 3, 1, 1).expand(2, 3, 4, 5) for rgb in ([1.0, -1, -1], [0.3] * 3, [-1.0, -1, 1])
    )
    assert redness(red).tolist() == [100, 100]
    assert redness(blue).tolist() == [-50, -50]
    assert redness(grey).abs().max() < 1e-5
    with pytest.raises(InvalidInputError, match=r"needs colour images.*use brightness"):
        redness(torch.zeros(2, 1, 8, 8))


@pytest.mark.slow
@pytest.mark.drawn
@pytest.mark.parametrize(
    ("mode", "reward"), [("RGB", "redness"), pytest.param("L", "brightness", marks=pytest.mark.slow)]
)
def test_pretrain_on_a_folder_and_finetune_the_result(mode, reward, tmp_path, capsys):
    folder = write_images(tmp_path / "images", mode=mode)
    out = tmp_path / "pretrained"
    call = [
        "pretrain",
        "--data",
        str(folder),
        "--out",
        str(out),
        "--steps",
        "3",
        "--batch",
        "4",
        "--channels",
        "8",
        "8",
    ]
    assert main([*call, "--chains", "2", "3"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    channels = 3 if mode == "RGB" else 1
    assert summary["images"]["event_shape"] == [channels, 16, 12]
    assert np.isfinite([summary["loss_train"], summary["loss_held_out"]]).all() and "quality" not in summary
    assert (out / "figures" / "samples.png").stat().st_size > 1000
    assert "images of 16 by 12 pixels" in (out / "model" / "README.md").read_text()
    assert load_pretrained(out / "model").event_shape == (channels, 16, 12)
    tiny = ["--num-steps", "3", "--batch", "2", "--updates", "2", "--starts", "4", "--kl-weight", "1"]
    call = ["finetune", "--model", str(out / "model"), *tiny, "--out", str(tmp_path / "run")]
    assert main([*call, "--reward", reward]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["updates"] == 2
    if mode == "L":
        assert main([*call[:-1], str(tmp_path / "red"), "--reward", "redness"]) == 2
        assert "needs colour images" in capsys.readouterr().err and not (tmp_path / "red").exists()


def test_the_network_follows_the_size():
    unet, _ = Network((3, 32, 32), (8, 8, 8, 8), 0, 0.1, 1000, "squaredcos_cap_v2", "v_prediction").build()
    assert unet.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    assert unet.config.up_block_types == ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    with torch.no_grad():
        assert unet(torch.zeros(1, 3, 32, 32), torch.tensor([5])).sample.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"batch": 0}, {"channels": (12,)}, {"lr": 0.0}])
def test_numbers_out_of_range(bad):
    with pytest.raises(InvalidInputError, match=f"--{next(iter(bad))}"):
        pretrain.run(pretrain.Config(**bad))
