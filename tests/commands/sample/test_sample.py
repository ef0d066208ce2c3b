"""Grids of `implicit-diffusion sample`, and the chain that a folder says it was fine-tuned for."""

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image

from implicit_diffusion.commands.sample import command as sample
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.chain_file import TrainedChain, write_chain
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.named import scheduler_for, table_for
from tests.helpers import tiny


def model(folder, **changes):
    DDPMPipeline(unet=tiny.unet(**tiny.PLAIN | changes), scheduler=tiny.scheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("size", "tile"),
    [((8, 16), (32, 64)), ((16, 8), (64, 32)), ((8, 8), (64, 64)), ((12, 20), (48, 80)), ((8, 72), (8, 72))],
)
def test_tiles_are_the_images_with_larger_pixels(tmp_path, size, tile):
    """Three images in a grid of two by two: every pixel is a square of equal size, and the fourth tile is black."""
    folder = model(tmp_path / "model", sample_size=size)
    loaded = load_pretrained(folder)
    table = table_for(scheduler_for(loaded.scheduler, "ddpm", clip=False), "ddpm", 2)
    write_chain(folder, TrainedChain(table))
    out = sample.run(sample.Config(model=str(folder), num=3, out=tmp_path / "grid.png", device="cpu"))
    grid = np.asarray(Image.open(out).convert("L"))
    assert grid.shape == (2 * tile[0], 2 * tile[1])
    with torch.no_grad():
        x = Chain(loaded.denoiser, table, loaded.event_shape).sample(Noise(0), 3)
    expected = ((x[:, 0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    times = tile[0] // size[0]
    for number in range(4):
        row, column = divmod(number, 2)
        shown = grid[row * tile[0] : (row + 1) * tile[0], column * tile[1] : (column + 1) * tile[1]]
        image = expected[number] if number < 3 else np.zeros(size)
        assert np.array_equal(shown, np.kron(image, np.ones((times, times))))


def test_samples_that_no_picture_shows_are_refused(tmp_path):
    folder = model(tmp_path / "model", in_channels=2, out_channels=2)
    with pytest.raises(InvalidInputError, match="samples of 2 channels, which no picture shows"):
        sample.run(sample.Config(model=str(folder), num=1, out=tmp_path / "grid.png"))
