"""Rewards of images on videos: the mean over their frames, with its gradient."""

import pytest
import torch

from implicit_diffusion.commands.rewards.names import load_reward
from implicit_diffusion.noise import Noise
from implicit_diffusion.reward_values import of_frames, takes_condition


def video(*shape):
    return Noise(0).normal(shape, 0, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("name", ["brightness", "redness", "sharpness", "jpeg-size"])
def test_the_reward_of_a_video_is_the_mean_of_its_frames(name):
    reward, x = load_reward(name), video(2, 3, 4, 8, 6)
    each = torch.stack([reward(x[:, :, frame]) for frame in range(4)], 1)
    assert reward(x).shape == (2,)
    torch.testing.assert_close(reward(x), each.mean(1))
    if name != "jpeg-size":
        (ours,), (theirs,) = (torch.autograd.grad(value.sum(), x) for value in (reward(x), each.mean(1)))
        torch.testing.assert_close(ours, theirs)


def test_every_frame_has_the_prompt_of_its_video():
    seen = []

    def reward(images, prompts):
        seen.append(prompts)
        return images.flatten(1).mean(1)

    adapted = of_frames(reward)
    assert takes_condition(adapted)
    adapted(video(2, 1, 3, 2, 2), ["a", "b"])
    adapted(video(2, 1, 3, 2, 2), torch.tensor([5, 7]))
    assert seen[0] == ["a", "a", "a", "b", "b", "b"] and seen[1].tolist() == [5, 5, 5, 7, 7, 7]


def test_images_are_given_as_they_are():
    kept = ({"scores": [1.0, 2.0]}, "more")
    assert of_frames(lambda images: kept)(video(2, 1, 3, 3)) is kept
