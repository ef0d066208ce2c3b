"""Shipped rewards against other libraries, and how often any reward is called."""

import io

import numpy as np
import pytest
import scipy.ndimage
import torch
from diffusers.image_processor import VaeImageProcessor

from implicit_diffusion.commands.rewards.names import load_reward
from implicit_diffusion.commands.shared.conditioning import Conditioning
from implicit_diffusion.denoisers.conditions import Drawn
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.loops import Nested, Queue
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.particles import Particles
from tests.helpers.oracles import affine_chain
from tests.objectives.contract import check


def images(channels, dtype=torch.float64, size=(9, 7)):
    return 0.8 * torch.randn(4, channels, *size, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("channels", [1, 3])
def test_sharpness_is_the_variance_of_the_laplacian(channels):
    """Of scipy, whose "mirror" border is that of OpenCV."""
    x = images(channels)
    pixels = 255 * (x / 2 + 0.5).clamp(0, 1).numpy()
    grey = pixels[:, 0] if channels == 1 else np.tensordot([0.299, 0.587, 0.114], pixels, (0, 1))
    right = [scipy.ndimage.laplace(each, mode="mirror").var() for each in grey]
    assert load_reward("sharpness")(x).tolist() == pytest.approx(right, rel=1e-12)
    check(Reward(load_reward("sharpness")), Particles(x))


@pytest.mark.parametrize("size", [(1, 5), (5, 1)])
def test_sharpness_needs_images_of_two_pixels(size):
    for x in (images(1, size=size), images(2), images(1)[:, 0]):
        with pytest.raises(InvalidInputError, match="sharpness needs images"):
            load_reward("sharpness")(x)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_size_of_a_jpeg_is_that_of_the_file_that_diffusers_would_save(channels):
    x = images(channels, torch.float32, size=(32, 40))
    sizes = []
    for picture in VaeImageProcessor().postprocess(x):
        file = io.BytesIO()
        picture.save(file, "jpeg", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    assert load_reward("jpeg-size")(x).tolist() == pytest.approx(sizes, rel=1e-6)
    assert torch.equal(load_reward("compressibility")(x), -load_reward("jpeg-size")(x))
    flat, noisy = load_reward("jpeg-size")(torch.stack([torch.zeros_like(x[0]), x[0]]))
    assert flat < noisy / 2
    with pytest.raises(InvalidInputError, match=r"called with 8-bit PIL images.*no gradient"):
        check(Reward(load_reward("jpeg-size")), Particles(x))


def test_pictures_of_latents_are_those_of_their_decoded_images():
    """Under prompts or classes, where states are decoded before the reward sees them."""
    conditions = Conditioning(Drawn("class_labels", torch.arange(3)))
    states, labels = images(3, torch.float32, size=(8, 8)), {"class_labels": torch.arange(4) % 3}
    given = []

    def reward(pictures: list, labels: torch.Tensor):
        given.append(labels)
        return [picture.size[0] + int(label) for picture, label in zip(pictures, labels)]

    reward.__annotations__["pictures"] = "list[Image.Image]"
    for function, right in (
        (load_reward("jpeg-size"), lambda x: load_reward("jpeg-size")(x)),
        (reward, lambda x: labels["class_labels"] + 16.0),
    ):
        of_states = Reward(conditions.of_states(function, lambda z: z.repeat_interleave(2, 3)))
        assert of_states.given_as == "8-bit PIL images"
        decoded = states.repeat_interleave(2, 3)
        assert torch.equal(of_states.of(Particles(states, condition=labels)), right(decoded))
    assert torch.equal(given[0], labels["class_labels"])


def test_unknown_names_are_told_all_that_there_are():
    with pytest.raises(
        InvalidInputError, match=r"neither brightness.*sharpness, jpeg-size, compressibility.*clip:MODEL"
    ):
        load_reward("sharp")
    with pytest.raises(InvalidInputError, match="jpeg-size takes no arguments"):
        load_reward("jpeg-size(90)")


class Slow:
    """A reward of batches that is paid by the call; it counts the samples of each."""

    def __init__(self):
        self.calls = []

    def __call__(self, x):
        self.calls.append(len(x))
        return x.sin().flatten(1).sum(1)


class SlowOfArrays(Slow):
    def __call__(self, x: np.ndarray):
        self.calls.append(len(x))
        return np.sin(x).sum(1)


@pytest.mark.parametrize("loop", [Nested, Queue])
def test_training_calls_a_reward_once_per_batch(loop):
    chain, slow, updates, batch = affine_chain(3)[0], Slow(), 4, 6
    optimizer = torch.optim.SGD(chain.denoiser.parameters(), lr=1e-3)
    training = loop(chain, Reward(slow) + PathKL(), optimizer, batch=batch, noise=Noise(0))
    tried, slow.calls = slow.calls, []
    assert len(tried) <= 6 and max(tried) <= 8
    ended = sum("reward" in metrics for metrics in training.run(updates=updates))
    assert ended == updates if loop is Nested else ended > 1
    assert slow.calls == [batch] * ended


@pytest.mark.parametrize("make", [Slow, SlowOfArrays])
def test_an_evaluation_calls_a_reward_once_per_batch(make):
    slow = make()
    evaluate(affine_chain(3)[0], Reward(slow).as_checked(), Noise(0), starts=8, repeats=2, chunk=4)
    assert slow.calls == [4] * 4
    slow.calls.clear()
    evaluate(affine_chain(3)[0], slow, Noise(0), starts=8, repeats=2, chunk=16)
    *tried, last = slow.calls
    assert last == 16 and len(tried) <= 5 and max(tried) <= 8
