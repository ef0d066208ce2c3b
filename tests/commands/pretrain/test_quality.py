"""How samples of images are judged, against the definitions."""

import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.neighbors import KNeighborsClassifier

from implicit_diffusion.commands.pretrain import quality
from implicit_diffusion.commands.pretrain.images.loading import Images, as_floats
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD, gaussian_kernel
from implicit_diffusion.particles import Particles

EVENT = (1, 4, 4)


def images(key, n, shift=0.0):
    return (0.3 * Noise(key).normal((n, *EVENT), 0) + shift).clamp(-1, 1)


def squared_mmd(x, y, width):
    return MMD(y, gaussian_kernel(width)).value(Particles(x)).item()


def data(classes=False):
    train, held_out = images(1, 300), images(2, 200)
    if not classes:
        return Images(train, held_out, "noise")
    labels = torch.arange(300) % 2, torch.arange(200) % 2
    signs = [(2.0 * each - 1).view(-1, 1, 1, 1) * 0.5 for each in labels]
    return Images(0.3 * train + signs[0], 0.3 * held_out + signs[1], "signs", (), ("low", "high"), *labels)


def test_mmd_is_the_u_statistic_of_an_independent_library():
    x, y, width = (images(3, 40).flatten(1).double(), images(4, 30, 0.2).flatten(1).double(), 1.3)
    kernel = [rbf_kernel(u, v, gamma=0.5 / width**2) for u, v in ((x, x), (y, y), (x, y))]
    within = [(k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in kernel[:2]]
    assert squared_mmd(x, y, width) == pytest.approx(sum(within) - 2 * kernel[2].mean(), rel=1e-10)


def test_halves_are_judged_as_two_sets():
    real, width, generator = images(5, 21).flatten(1).double(), 1.1, torch.Generator().manual_seed(3)
    kernel = (-0.5 * (torch.cdist(real, real) / width) ** 2).exp()
    made = quality.mmd_of_halves(kernel, quality.SPLITS, generator)
    generator.manual_seed(3)
    for split in range(quality.SPLITS):
        order = torch.randperm(21, generator=generator)
        halves = real[order < 10], real[order >= 10]
        assert made[split].item() == pytest.approx(squared_mmd(*halves, width), abs=1e-12)


def test_neighbours_are_those_of_an_independent_library(monkeypatch):
    monkeypatch.setattr(quality, "AT_ONCE", 7)
    real = data(classes=True)
    x = images(6, 50).flatten(1).double()
    nearest, classes = quality.neighbours(x, real)
    known = KNeighborsClassifier(5).fit(as_floats(real.train).flatten(1), real.train_labels)
    assert classes.tolist() == known.predict(x).tolist()
    distances = known.kneighbors(x, 1)[0][:, 0]
    torch.testing.assert_close(nearest, torch.from_numpy(distances), rtol=1e-6, atol=1e-9)


def test_real_images_others_and_copies_are_told_apart():
    real = data()
    fresh, far, copies = images(7, 200), images(8, 200, 0.4), real.train[:200].clone()
    judged = {name: quality.judge_images(x, real, Noise(0)) for name, x in
              {"fresh": fresh, "far": far, "copies": copies}.items()}  # fmt: skip
    for each in judged.values():
        assert each.samples == 200 and abs(each.mmd_of_halves) < 0.5 * each.mmd_of_halves_std
    spread = judged["fresh"].mmd_of_halves_std
    assert abs(judged["fresh"].mmd) < 4 * spread and judged["far"].mmd > 20 * spread
    assert judged["fresh"].memorised < 0.05 and judged["copies"].memorised == 1 and judged["copies"].nearest == 0
    assert judged["fresh"].as_asked is None and "memorised" in quality.in_words(judged["fresh"])


def test_classes_are_those_that_were_asked_for():
    real = data(classes=True)
    turn = (2.0 * (torch.arange(60) % 2) - 1).view(-1, 1, 1, 1)
    right, wrong = (quality.judge_images(images(9, 60) * 0.3 + sign * 0.5 * turn, real, Noise(0)) for sign in (1, -1))
    assert right.as_asked == 1 and wrong.as_asked == 0 and right.held_out_as_labelled == 1
    assert (
        "100 % of the class asked for, by neighbours that are right about 100 % of held-out ones"
        in quality.in_words(right)
    )
