"""The real digits, the classifiers of them, the rewards, and the numbers that say how good samples are."""

import json
from dataclasses import asdict

import pytest
import torch

from implicit_diffusion import digits
from implicit_diffusion.commands.rewards.shipped import brightness, darkness
from implicit_diffusion.digits.data import SPLIT_SEED
from implicit_diffusion.digits.quality import _reference
from implicit_diffusion.errors import InvalidInputError

FIRST_LABELS = [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
CLASSIFIER = digits.ASSETS / "digits_classifier"


def rows(images):
    return {tuple(image.flatten().tolist()) for image in images}


def test_the_split_is_fixed_disjoint_and_stratified():
    data = digits.load_digits()
    assert data.train.shape == (1437, 1, 8, 8) and data.held_out.shape == (360, 1, 8, 8)
    assert data.train.dtype == data.held_out.dtype == torch.float32
    assert data.train.min() == -1 and data.train.max() == 1
    assert not rows(data.train) & rows(data.held_out)
    assert data.held_out_labels.bincount(minlength=10).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert data.held_out_labels[:12].tolist() == FIRST_LABELS  # another split would invalidate every stated number


def test_the_shipped_classifier_has_the_stated_accuracy():
    stated = json.loads((CLASSIFIER / "config.json").read_text())
    assert digits.accuracy(digits.load_classifier()) == stated["held_out_accuracy"] >= 0.97
    assert stated["held_out_digits"] == 360
    assert sum(file.stat().st_size for file in CLASSIFIER.iterdir()) < 200_000


def test_a_folder_without_classifier_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match=r"config\.json"):
        digits.load_classifier(tmp_path)


def test_training_a_classifier_is_reproducible_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second = (digits.train_classifier(steps=3, batch=16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_the_judge_is_accurate_and_returns_probabilities():
    judge = digits.fit_judge()
    assert digits.accuracy(judge) >= 0.98
    probabilities = judge(torch.randn(5, 1, 8, 8, dtype=torch.float64))
    assert probabilities.shape == (5, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_brightness_is_the_mean_pixel_in_per_cent(dtype):
    x = torch.stack([torch.full((1, 8, 8), value, dtype=dtype) for value in (-1.0, 0.0, 0.5, 1.0)])
    assert brightness(x).tolist() == [0.0, 50.0, 75.0, 100.0]
    assert brightness(x).dtype == dtype
    assert torch.equal(darkness(x), -brightness(x))


def test_digit_log_probability_is_differentiable_in_double_too():
    x = digits.load_digits().held_out[:6]
    every = torch.stack([digits.digit_log_probability(digit)(x) for digit in range(10)], dim=1)
    torch.testing.assert_close(every, digits.load_classifier()(x).log_softmax(1))
    reward = digits.digit_log_probability(3)
    assert torch.autograd.gradcheck(reward, x[:1].double().requires_grad_())


@pytest.mark.parametrize("digit", [-1, 10])
def test_digit_log_probability_knows_ten_digits(digit):
    with pytest.raises(InvalidInputError, match="digit"):
        digits.digit_log_probability(digit)


def test_real_digits_look_real():
    result = digits.judge_samples(digits.load_digits().held_out)
    assert result.classifier_confidence > 0.97 and result.judge_confidence > 0.9
    assert result.judge_agreement > 0.97
    assert result.mmd < result.mmd_reference.quantile_95
    assert result.memorised < 0.03  # 1 % by definition, up to the quantile's rounding
    assert sum(result.class_histogram) == pytest.approx(1.0)
    json.dumps(asdict(result), allow_nan=False)


def test_noise_does_not_look_real():
    result = digits.judge_samples(torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert result.mmd > 100 * result.mmd_reference.quantile_95
    assert result.judge_agreement < 0.6
    assert result.nearest_distance > 3 * result.held_out.nearest_distance
    assert result.memorised == 0.0


def test_training_digits_are_memorised():
    result = digits.judge_samples(digits.load_digits().train)
    assert result.memorised == 1.0 and result.nearest_distance == 0.0


def test_squared_mmd_agrees_with_its_definition():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64) for n in (5, 7))

    def mean(u, v, same):
        width = _reference().bandwidth
        values = [
            torch.exp(-(a - b).square().sum() / (2 * width**2)).item()
            for i, a in enumerate(u)
            for j, b in enumerate(v)
            if not (same and i == j)
        ]
        return sum(values) / len(values)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert digits.squared_mmd(x, y) == pytest.approx(expected, abs=1e-12)


def test_the_reference_is_the_mmd_between_halves():
    data, reference = digits.load_digits(), _reference()
    real = torch.cat([data.train, data.held_out])
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(SPLIT_SEED))
    values = [digits.squared_mmd(real[order < len(real) // 2], real[order >= len(real) // 2])]
    assert _reference(splits=1).mmd_mean == pytest.approx(values[0], abs=1e-12)
    assert abs(reference.mmd_mean) < reference.mmd_quantile < 1e-3


@pytest.mark.parametrize("samples", [torch.zeros(1, 1, 8, 8), torch.full((3, 1, 8, 8), float("nan"))])
def test_quality_refuses_what_it_cannot_judge(samples):
    with pytest.raises(InvalidInputError, match="samples"):
        digits.judge_samples(samples)
