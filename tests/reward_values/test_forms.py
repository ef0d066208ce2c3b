"""What a reward is called with: tensors, arrays or pictures, as the annotation of its first parameter says."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from implicit_diffusion.commands.rewards.names import load_reward
from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.objectives import Reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials import Guided
from implicit_diffusion.reward_values import given_as, of_tensors, takes_condition
from tests.helpers.oracles_gibbs import Banana
from tests.objectives.contract import check


def images(channels, dtype=torch.float32):
    """With pixels outside [−1, 1] too, and on the borders between two whole numbers of 8 bits."""
    x = 1.2 * torch.randn(3, channels, 6, 5, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = (torch.tensor([0.5, 1.5, 2.5, 127.5, 254.5]) / 255) * 2 - 1
    return x.to(dtype)


def received(annotation):
    """A reward with this annotation, and the list of what it is called with."""
    calls = []

    def reward(x):
        calls.append(x)
        return [float(i) for i in range(len(x))]

    reward.__annotations__["x"] = annotation
    return reward, calls


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pictures_and_arrays_are_those_that_diffusers_makes(channels, dtype):
    x, processor = images(channels, dtype), VaeImageProcessor()
    for annotation, output in ((list[Image.Image], "pil"), (np.ndarray, "np")):
        reward, (calls) = received(annotation)
        assert Reward(reward).of(Particles(x)).tolist() == [0, 1, 2]
        right = processor.postprocess(x, output_type=output)
        assert len(calls[0]) == len(right) == 3
        for ours, theirs in zip(calls[0], right):
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))
        if output == "pil":
            assert [each.mode for each in calls[0]] == [each.mode for each in right]
        else:
            assert calls[0].dtype == right.dtype == np.float32


def test_arrays_of_8_bits_are_the_pictures():
    x = images(3)
    (numbers, arrays), (pictures, pils) = received(NDArray[np.uint8]), received(list[PIL.Image.Image])
    for reward in (numbers, pictures):
        Reward(reward).of(Particles(x))
    assert arrays[0].dtype == np.uint8
    assert np.array_equal(arrays[0], np.stack([np.asarray(each) for each in pils[0]]))


def test_points_are_no_images_and_come_as_they_are():
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reward, calls = received(np.ndarray)
    Reward(reward).of(Particles(x))
    assert np.array_equal(calls[0], x.numpy())
    reward, _ = received(list[Image.Image])
    with pytest.raises(InvalidInputError, match=r"only samples of shape .n, 1, H, W. or .n, 3, H, W.*got \(3, 2\)"):
        Reward(reward).of(Particles(x))


PICTURES, ARRAYS, TENSORS = "8-bit PIL images", "NumPy arrays", None
ANNOTATIONS = [
    (list[Image.Image], PICTURES),
    (Sequence[PIL.Image.Image], PICTURES),
    ("list[Image.Image]", PICTURES),
    ("list[Image]", PICTURES),  # the module, here
    ("List[Image]", PICTURES),  # of names that only a type checker imports
    ("typing.Sequence['PIL.Image.Image']", PICTURES),
    ("list[PILImage.Image]", PICTURES),
    (np.ndarray, ARRAYS),
    ("np.ndarray", ARRAYS),
    ("numpy.ndarray", ARRAYS),
    (NDArray[np.float32], ARRAYS),
    (Float[np.ndarray, "n H W C"], ARRAYS),
    (NDArray[np.uint8], "8-bit NumPy arrays"),
    (Tensor, TENSORS),
    ("torch.Tensor", TENSORS),
    (Float[Tensor, "n *event"], TENSORS),
    (Tensor | np.ndarray, TENSORS),
    ("tv_tensors._image.Image", TENSORS),
    (Any, TENSORS),
]


@pytest.mark.parametrize(("annotation", "words"), ANNOTATIONS)
def test_the_annotation_says_what_a_reward_is_given(annotation, words):
    assert given_as(of_tensors(received(annotation)[0])) == words


class Judge(nn.Module):
    def forward(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [float(len(prompt)) for prompt in prompts]


class Called:
    def __call__(self, images: "np.ndarray", scale=1.0):
        return scale * images.mean((1, 2, 3))


def test_modules_instances_partials_and_methods_say_it_too():
    for function, words in (
        (Judge(), PICTURES),
        (Called(), ARRAYS),
        (Called().__call__, ARRAYS),
        (functools.partial(Called(), scale=2.0), ARRAYS),
        (abs, TENSORS),
        (lambda x: x, TENSORS),
        (nn.Flatten(), TENSORS),
    ):
        adapted = of_tensors(function)
        assert given_as(adapted) == words and (words is not None or adapted is function)
        assert takes_condition(adapted) == takes_condition(function) == isinstance(function, Judge)
        assert of_tensors(adapted) is adapted  # converted once, whoever asks
    assert list(Reward(Judge()).networks())


WRONG = [Image.Image, "Image.Image", "Image", list[np.ndarray], "List[np.ndarray]"]


@pytest.mark.parametrize("annotation", WRONG)
def test_what_is_no_form_of_a_batch_is_refused_with_those_that_are(annotation):
    with pytest.raises(InvalidInputError, match=r"all samples of a batch.*list\[PIL.Image.Image\].*as np.ndarray"):
        Reward(received(annotation)[0])


def test_a_black_box_has_no_gradient_and_says_so_where_one_is_needed():
    x = images(1)
    for annotation, words in ((list[Image.Image], PICTURES), (np.ndarray, ARRAYS)):
        reward = Reward(received(annotation)[0])
        assert words in repr(reward) and reward.given_as == words
        reward.check_value(Particles(x))
        with pytest.raises(InvalidInputError, match=f"called with {words}.*no gradient.*an estimator"):
            check(reward, Particles(x))
        with pytest.raises(InvalidInputError, match=f"called with {words}.*which guidance follows"):
            Guided(Banana(), received(annotation)[0], 0.5)


def test_it_may_write_into_what_it_is_given_and_answer_in_any_dtype():
    """As a model of the user's own, which runs in single precision, or counts."""
    answers = [lambda x: torch.arange(3), lambda x: np.arange(3), lambda x: ([0, 1, 2], {}), lambda x: (0.0, 1.0, 2.0)]
    for dtype in (torch.float32, torch.float64):
        x = images(3, dtype).requires_grad_()
        for answer in answers:

            def reward(images: np.ndarray, answer=answer):
                images[:] = 0
                return answer(images)

            scores = Reward(reward).of(Particles(x))
            assert scores.dtype == dtype and scores.tolist() == [0, 1, 2] and not scores.requires_grad
        assert torch.equal(x, images(3, dtype))


def test_particles_are_trained_by_a_reward_of_arrays():
    """Which needs no ∇R; the values are those of the same reward in torch."""
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def reward(points: np.ndarray) -> np.ndarray:
        return np.sin(points).sum(1)

    ours, right = Reward(reward), Reward(lambda x: x.sin().sum(1))
    ours.check_stationary(Particles(x), x.sum(1))
    found, expected = (each.first_variation(Particles(x)).function for each in (ours, right))
    assert torch.allclose(found, expected, rtol=1e-14)


def test_the_forms_of_a_file_whose_annotations_are_strings(tmp_path):
    (tmp_path / "my.py").write_text(
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "import numpy as np\n"
        "if TYPE_CHECKING:\n    from PIL.Image import Image\n"
        "def whites(images: list[Image]) -> list[float]:\n    return [sum(i.histogram()[255:]) / 1.0 for i in images]\n"
        "def light(images: np.ndarray, prompts):\n    return images.mean((1, 2, 3)) + len(prompts)\n"
        "class Weighted:\n    def __init__(self, weight=1.0): self.weight = weight\n"
        "    def __call__(self, images: list[Image]):\n        return [self.weight * i.size[0] for i in images]\n"
    )
    x = torch.ones(2, 1, 4, 5)
    assert load_reward(f"{tmp_path}/my.py:whites")(x).tolist() == [20, 20]
    assert load_reward(f"{tmp_path}/my.py:Weighted(weight=2)")(x).tolist() == [10, 10]
    light = Reward(load_reward(f"{tmp_path}/my.py:light"))
    assert light.conditional and light.given_as == ARRAYS
    assert light.of(Particles(x, condition={"prompts": torch.ones(2)})).tolist() == [2, 2]


def test_pictures_of_samples_that_are_not_finite_are_refused():
    """A reward of them would be of something else."""
    x = images(1)
    x[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="no picture"):
        Reward(received(list[Image.Image])[0]).of(Particles(x))


ANSWERS = {
    r"got list of 2 \(float\); return 3 numbers, one for each sample, in the order": [1.0, 2.0],
    r"got list of 3 \(float, str\), and words are no numbers: convert each, as float\(answer\)": [1.0, "0.5", "bad"],
    r"got list of 3 \(NoneType, float\)": [1.0, None, 2.0],
    r"got \(4,\); return 3 numbers": torch.zeros(4),
    "got int, one number for all": 3,
}


@pytest.mark.parametrize("message", ANSWERS)
def test_other_answers_of_a_black_box_are_refused(message):
    def reward(images: list[Image.Image]):
        return ANSWERS[message]

    with pytest.raises(InvalidInputError, match=message):
        Reward(reward).of(Particles(images(1)))


def test_a_dict_may_hold_one_list_of_numbers():
    assert Reward(lambda x: {"aesthetic": [1, 2, 3], "words": ["a", "b", "c"]}).of(Particles(images(1))).tolist() == [
        1,
        2,
        3,
    ]


def test_nan_for_some_of_the_samples_is_counted():
    def reward(images: list[Image.Image]):
        return [1.0, float("nan"), 2.0]

    with pytest.raises(NonFiniteError, match="reward of 1 of 3 samples is NaN"):
        Reward(reward).finite_values(Particles(images(1)))
