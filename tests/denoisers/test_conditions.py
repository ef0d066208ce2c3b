"""What is drawn for a sample, looked up for it, and amplified."""

import copy

import pytest
import torch

from implicit_diffusion.denoisers.conditions import ClassifierFree, Drawn, Embedded
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.noise import Noise

VALUES = torch.tensor([3, 5, 8])


def test_draws_are_addressed_uniform_and_independent():
    drawn = Drawn("class_labels", VALUES)
    first = drawn(Noise(0), 3000, 7)["class_labels"]
    assert torch.equal(first, drawn(Noise(0), 3000, 7)["class_labels"])
    assert not torch.equal(first, drawn(Noise(0), 3000, 8)["class_labels"])
    assert not torch.equal(first, drawn(Noise(0).stream(1), 3000, 7)["class_labels"])
    share = (first[:, None] == VALUES).double().mean(0)
    assert (share - 1 / 3).abs().max() < 4 * (2 / 9 / 3000) ** 0.5
    with pytest.raises(InvalidInputError, match="no values of class_labels"):
        Drawn("class_labels", VALUES[:0])


class Spy(torch.nn.Module):
    def forward(self, x, t, **condition):
        self.seen = condition
        return x * condition["a"][:, None] + t[:, None]


TABLE = {"a": torch.arange(3.0), "b": torch.arange(6.0).view(3, 2)}
X, T = torch.ones(2, 4), torch.tensor([10.0, 20.0])


def test_rows_are_looked_up_and_the_table_is_shared():
    net = Embedded(Spy(), TABLE)
    u = net(X, T, prompt=torch.tensor([2, 0]), other=T)
    assert torch.equal(u[:, 0], torch.tensor([12.0, 20.0])) and net.denoiser.seen.keys() == {"a", "b", "other"}
    assert copy.deepcopy(net).table is net.table and not net.state_dict()
    with pytest.raises(InvalidInputError, match="columns of one length"):
        Embedded(Spy(), {"a": torch.zeros(2), "b": torch.zeros(3)})


def test_guidance_is_its_formula_in_one_call():
    inner = Embedded(Spy(), TABLE)
    prompt = torch.tensor([2, 1])
    given, without = inner(X, T, prompt=prompt), inner(X, T, prompt=torch.zeros(2, dtype=torch.long))
    calls = []
    inner.denoiser.register_forward_hook(lambda *a: calls.append(1))
    for scale in (1.0, 0.0, 7.5):
        guided = ClassifierFree(inner, scale, {"prompt": 0})(X, T, prompt=prompt)
        torch.testing.assert_close(guided, without + scale * (given - without))
    assert len(calls) == 3
    for null, condition in (({"promt": 0}, {"prompt": prompt}), ({"prompt": 0}, {})):
        with pytest.raises(InvalidInputError, match=r"null holds (promt|prompt), but the condition (prompt|nothing);"):
            ClassifierFree(inner, 2.0, null)(X, T, **condition)
    for scale, null in ((float("nan"), {"prompt": 0}), (2.0, {})):
        with pytest.raises(InvalidInputError, match="finite scale"):
            ClassifierFree(inner, scale, null)


def test_weights_decide_how_often_a_value_is_drawn():
    weights = torch.tensor([1.0, 0.0, 3.0])
    drawn = Drawn("prompt", VALUES, weights)
    first = drawn(Noise(0), 30_000, 7)["prompt"]
    assert torch.equal(first, drawn(Noise(0), 30_000, 7)["prompt"])
    assert torch.equal(first, Drawn("prompt", VALUES, 10 * weights)(Noise(0), 30_000, 7)["prompt"])
    assert not torch.equal(first, drawn(Noise(0), 30_000, 8)["prompt"])
    count = (first[:, None] == VALUES).double().mean(0)
    assert count[1] == 0 and abs(count[0] - 0.25) < 4 * (0.25 * 0.75 / 30_000) ** 0.5 < 0.02 * 0.75
    for wrong in (-weights, 0 * weights, weights / 0):
        with pytest.raises(InvalidInputError, match="weights"):
            Drawn("prompt", VALUES, wrong)


def test_every_prompt_is_guided_away_from_its_own():
    inner = Embedded(Spy(), TABLE)
    prompt = torch.tensor([2, 0, 0])
    x, t = torch.ones(3, 4), torch.tensor([10.0, 20.0, 30.0])
    guided = ClassifierFree(inner, 3.0, {"prompt": torch.tensor([1, 0, 2])})(x, t, prompt=prompt)
    given, away = inner(x, t, prompt=prompt), inner(x, t, prompt=torch.tensor([2, 1, 1]))
    torch.testing.assert_close(guided, away + 3.0 * (given - away))
    one = ClassifierFree(inner, 3.0, {"prompt": torch.tensor([2, 2, 2])})(x, t, prompt=prompt)
    assert torch.equal(one, ClassifierFree(inner, 3.0, {"prompt": 2})(x, t, prompt=prompt))
