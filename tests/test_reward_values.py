"""What a reward is called with and what it returns: every form has the values and the gradient of the plain one."""

import functools
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError, trying
from implicit_diffusion.objectives import Reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials import Guided
from implicit_diffusion.reward_values import scores_of, takes_condition
from tests.helpers.oracles_gibbs import Banana
from tests.objectives.contract import check

X = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Result = namedtuple("Result", ["scores", "info"])


def plain(x):
    return (x**3).flatten(1).mean(1)


INFO = {"sharpness": torch.zeros(3)}
FORMS = {
    "a column": lambda r: r[:, None],
    "a row, as of one prompt": lambda r: r[None],
    "a map of one pixel": lambda r: r[:, None, None, None],
    "scores and info": lambda r: (r, INFO),
    "a column and info": lambda r: [r[:, None], INFO],
    "scores and None": lambda r: (r, None),
    "a named pair": lambda r: Result(r, INFO),
    "a dict with the reward": lambda r: {"loss": -r, "reward": r},
    "a dict with scores": lambda r: {"loss": -r, "scores": r[:, None]},
    "the reward before the score": lambda r: {"score": -r, "reward": r},
    "the only tensor of a dict": lambda r: {"aesthetic": r, "model": "v2", "layers": 3},
    "a list of numbers with gradients": lambda r: list(r),
    "a list of vectors of one": lambda r: tuple(r[:, None]),
}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_values_and_gradients_of_the_plain_reward(form, n):
    x, same = (X[:n].clone().requires_grad_() for _ in range(2))
    found, right = Reward(lambda x: FORMS[form](plain(x))).of(Particles(x)), plain(same)
    assert torch.equal(found, right)
    (found**2).sum().backward()
    (right**2).sum().backward()
    assert torch.equal(x.grad, same.grad)
    check(Reward(lambda x: FORMS[form](plain(x))), Particles(X[:n]))


WITHOUT = {
    "an array": lambda r: r.numpy(),
    "a column of an array": lambda r: r.numpy()[:, None],
    "an array and info": lambda r: (r.numpy(), {}),
    "the only array of a dict": lambda r: {"aesthetic": r.numpy(), "prompts": ["a", "b", "c"]},
    "a list": lambda r: r.tolist(),
    "a list of NumPy's numbers": lambda r: list(r.numpy()),
}


@pytest.mark.parametrize("form", WITHOUT)
def test_black_boxes_may_leave_torch(form):
    """Their values are of the samples' dtype; where a gradient is needed, that is what the message is about."""
    reward = Reward(lambda x: WITHOUT[form](plain(x.detach())))
    assert torch.equal(reward.finite_values(Particles(X)), plain(X))
    assert reward.finite_values(Particles(X.float())).dtype == torch.float32
    reward.check_stationary(Particles(X), X.sum((1, 2, 3)))
    with pytest.raises(InvalidInputError, match="not differentiable, and its gradient was to be followed"):
        check(reward, Particles(X))


def test_which_form_it_is_does_not_depend_on_the_number_of_samples():
    """Two scores are no pair, and a pair of scores is no score with info, however many samples there are."""
    for n in (1, 2, 3):
        assert scores_of([1.0] * n, X[:n]).tolist() == [1.0] * n
        with pytest.raises(InvalidInputError, match=r"tuple of 2 .Tensor.*a pair .scores, info. whose info is a dict"):
            scores_of((torch.zeros(n, 2), torch.ones(n, 2)), X[:n])
    with pytest.raises(InvalidInputError, match=r"got \(2, 3\)"):  # of two rewards, and of two samples as well
        scores_of(torch.zeros(2, 3), X)


REFUSED = {
    r"a dict with the keys 'a', 'b', which does not say what to maximise; name the scores 'reward'": {
        "a": torch.zeros(3),
        "b": torch.ones(3),
    },
    "a dict of nothing": {},
    "got None; end it with return": None,
    r"got \(\), one number for all samples; average within each sample .*reduction=\"none\"": torch.tensor(1.0),
    "got float, one number for all": 1.0,
    r"got \(\) in a tuple, one number for all": (torch.tensor(1.0), {}),
    r"got \(3, 4\); average over all dimensions but the first": torch.zeros(3, 4),
    r"got \(4,\)": torch.zeros(4),
    r"got \(3, 3\)": torch.zeros(3, 3),
    "got function; call a function that makes a reward: FILE.py:make": plain,
    "got str": "good",
    r"got list of 3 \(str\)": ["a", "b", "c"],
    "got list of 0": [],
    r"got ndarray of float64 with shape \(3, 2\)": np.zeros((3, 2)),
    "got ndarray of <U1 with shape": np.array(["a", "b", "c"]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_one_number_per_sample_is_refused_with_what_would_work(message):
    with pytest.raises(InvalidInputError, match=message):
        scores_of(REFUSED[message], X)


def test_a_batch_of_one_may_lose_its_dimension():
    """As `.squeeze()` does, in the last batch of an evaluation."""
    reward = Reward(lambda x: (x**3).mean((1, 2, 3), keepdim=True).squeeze())
    for n in (1, 3):
        assert torch.equal(reward.finite_values(Particles(X[:n])), plain(X[:n]))


# ------------------------------------------------------------------------------------------- the advice of messages

FAULTS = {  # a fault, what its message advises, and that taken literally
    "a mean over all": (lambda x: x.mean(), "x.flatten(1).mean(1)", lambda x: x.flatten(1).mean(1)),
    "a map": (lambda x: x[:, 0] ** 3, ".flatten(1).mean(1)", lambda x: (x[:, 0] ** 3).flatten(1).mean(1)),
    "a metric over the batch": (
        lambda x: nn.functional.l1_loss(x, 0 * x),
        'reduction="none"',
        lambda x: nn.functional.l1_loss(x, 0 * x, reduction="none").flatten(1).mean(1),
    ),
    "another dtype": (lambda x: plain(x).half(), ".to(x.dtype)", lambda x: plain(x).half().to(x.dtype)),
    "NumPy": (
        lambda x: torch.from_numpy(x.detach().numpy()).flatten(1).mean(1),
        "without .detach(), .numpy()",
        lambda x: x.flatten(1).mean(1),
    ),
    "numbers": (lambda x: [i.mean().item() for i in x], ".item()", lambda x: [i.mean() for i in x]),
    "a dict": (lambda x: {"a": plain(x), "b": x}, "'reward'", lambda x: {"reward": plain(x), "b": x}),
    "two things": (
        lambda x: (plain(x), x),
        "(scores, info) whose info is a dict",
        lambda x: (plain(x), {"x": x}),
    ),
    "no return": (lambda x: None, "end it with return", plain),
    "a factory": (lambda x: plain, "Reward(make())", plain),
    "integers": (
        lambda x: (100 * x).int().flatten(1).sum(1),
        "without integers",
        lambda x: (100 * x).flatten(1).sum(1),
    ),
    "a comparison": (lambda x: (x > 0).flatten(1).any(1), "comparisons", lambda x: x.flatten(1).amax(1)),
}


class Plain(nn.Module):
    """The plain reward as a network."""

    def forward(self, x):
        return plain(x)


with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    TRAINING, EVALUATING = (
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 1)).double().train(mode) for mode in (True, False)
    )
FAULTS |= {
    "batch norm": (lambda x: TRAINING(x), "Put batch norm into eval mode", lambda x: EVALUATING(x)),
    "a mean over the batch": (lambda x: plain(x) - plain(x).mean(), "do not use means", plain),
    "rounding": (lambda x: plain(8 * x.round()) + 0 * plain(x), "avoid that", lambda x: plain(8 * x)),
    "arguments in another order": (
        lambda prompts, images: plain(images),
        "exchange them",
        lambda images, prompts: plain(images),
    ),
    "three arguments": (
        lambda images, prompts, metadata: plain(images),
        "give the others defaults",
        lambda images, prompts, metadata=None: plain(images),
    ),
    "an argument by name": (
        lambda *, images: plain(images),
        "let the samples come by position",
        lambda images: plain(images),
    ),
    "a class": (Plain, "use an instance of it, Plain(...)", Plain()),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_advice_of_a_message_works(name):
    fault, advice, followed = FAULTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither torch's advice to detach
        with pytest.raises(InvalidInputError) as refusal:
            check(Reward(fault), Particles(X, condition={"prompts": torch.arange(3)}))
        assert advice in str(refusal.value)
        check(Reward(followed), Particles(X, condition={"prompts": torch.arange(3)}))


def test_torch_does_not_advise_what_is_refused_next():
    """ "Use tensor.detach().numpy() instead" leads to a reward without a gradient."""
    message = "NumPy passes no gradient on: use torch operations"
    with pytest.raises(InvalidInputError, match=message) as refusal, trying("reward", "samples"):
        X.clone().requires_grad_().numpy()
    assert "detach" not in str(refusal.value)


# ------------------------------------------------------------------------------------------------- its arguments

ONE = [plain, lambda x, scale=1.0: x, lambda *x: x, lambda x, **more: x, functools.partial(lambda x, w: x, w=1), abs]
TWO = [lambda x, prompts: x, lambda images, prompts, scale=1.0: x, lambda images, class_labels, **more: x]
NEITHER = {
    "got a function of images, prompts, metadata; give the others defaults": lambda images, prompts, metadata: images,
    "got one of images=…; give the others defaults, and let the samples come by position": lambda *, images: images,
    r"its arguments are \(prompts, images\); exchange them": lambda prompts, images: images,
}


def test_one_argument_is_the_samples_and_the_second_what_they_were_sampled_under():
    assert [takes_condition(function) for function in ONE] == [False] * len(ONE)
    assert [takes_condition(function) for function in TWO] == [True] * len(TWO)


@pytest.mark.parametrize("message", NEITHER)
def test_other_arguments_are_refused_by_name(message):
    with pytest.raises(InvalidInputError, match=message):
        Reward(NEITHER[message])


def test_a_second_argument_that_nothing_can_fill_says_which():
    with pytest.raises(InvalidInputError, match=r"the samples and what they were sampled under \(prompts, class"):
        check(Reward(lambda x, prompts: plain(x)), Particles(X))


def test_a_class_in_place_of_a_reward_is_told_from_its_instance():
    with pytest.raises(InvalidInputError, match=r"got the class Identity; use an instance of it, Identity\(\.\.\.\)"):
        Reward(nn.Identity)


def test_guidance_reads_them_alike():
    """A column would make V − λR a matrix."""
    net, x = Banana(), torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns, right = Guided(net, lambda x: (x[:, :1], {}), 0.5), Guided(net, lambda x: x[:, 0], 0.5)
    assert torch.equal(columns(x), right(x))
