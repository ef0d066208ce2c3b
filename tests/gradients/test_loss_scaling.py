"""Γ through a float16 network against the same network in float32, where unscaled adjoints would vanish."""

import pytest
import torch
from torch import nn

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.gradients import Adjoint, AdjointMatching, FullBackprop, ScoreFunction, loss_scaling
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.samplers.chain import Chain
from tests.gradients.surrogate_cases import Fixed, using
from tests.helpers import tiny
from tests.helpers.oracles import table

N, BATCH = 4, 3
SMALL = 1e-6  # of the reward and of β: cotangents of 10⁻⁹ and less, which float16 does not hold


def reward(x):
    return SMALL * (torch.tanh(x.flatten(1)).mean(1) - 0.1 * x.flatten(1).square().mean(1))


def build(precision, loop=Nested, objective=None, **options):
    """A loop away from u_0, that moves θ once after N estimates, and the Γ's that its optimizer has been given."""
    denoiser = DiffusersDenoiser(tiny.unet())
    g = torch.Generator().manual_seed(0)
    for p in denoiser.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    chain = Chain(denoiser, table(N), (1, 8, 8), pretrained_rows=(1,))
    chain.reference.precision = denoiser.precision = precision
    for p in denoiser.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    optimizer, given = torch.optim.SGD(denoiser.parameters(), lr=1.0), []
    optimizer.register_step_pre_hook(lambda *_: given.append(gradient(denoiser)))
    objective = objective or Reward(reward) + SMALL * PathKL()
    return loop(chain, objective, Update(optimizer, accumulate=N), batch=BATCH, noise=Noise(1), **options), given


def gradient(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).double()


def relative_error(loop, **options):
    """Of the Γ that N estimates give: those of the queue are one trajectory's, those of the nested loop N of them."""
    found = []
    for precision in (torch.float16, None):
        made, given = build(precision, loop, **options)
        for _ in made.run(1):
            pass
        found += given
    ours, reference = found
    assert 0 < reference.abs().max() < 1e-4
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("loop", [pytest.param(Nested, marks=pytest.mark.slow), Queue])
@pytest.mark.parametrize("estimator", [Adjoint, pytest.param(AdjointMatching, marks=pytest.mark.slow), ScoreFunction])
def test_small_cotangents_survive(loop, estimator):
    assert relative_error(loop, estimator=estimator()) < 5e-3


@pytest.mark.parametrize("loop", [pytest.param(Nested, marks=pytest.mark.slow), Queue])
def test_both_parts_of_a_surrogate_survive(loop):
    estimator = using(Fixed(lambda x: 0.8 * reward(x)))
    assert relative_error(loop, estimator=estimator) < 5e-3


@pytest.mark.parametrize("loop", [pytest.param(Nested, marks=pytest.mark.slow), Queue])
def test_without_the_scale_they_would_not(loop, monkeypatch):
    monkeypatch.setattr(loss_scaling, "scale", lambda cotangents: torch.ones(()))
    assert relative_error(loop) > 0.5


@pytest.mark.parametrize("scaled", [True, False])
def test_a_constant_cotangent_over_many_numbers_does_not_overflow(scaled, monkeypatch):
    """The last layer's bias sums all cotangents: a scale that brings the largest near one would end at infinity."""
    if not scaled:
        monkeypatch.setattr(loss_scaling, "scale", lambda found: 2.0 ** -next(iter(found)).abs().max().log2().floor())
    network = nn.Conv2d(1, 1, 1)
    chain = Chain(DiffusersDenoiser(Pointwise(network)), table(1), (1, 256, 256))
    chain.reference.precision = chain.denoiser.precision = torch.float16
    with torch.backends.mkldnn.flags(enabled=False):  # on processors with float16 it sums in float16, off by 0.3 %
        Adjoint()(chain, Reward(lambda x: x.flatten(1).mean(1)), Noise(0), 4)
    assert network.bias.grad.isfinite().all() == scaled
    if scaled:
        torch.testing.assert_close(network.bias.grad.double(), -chain.table.b, rtol=1e-3, atol=0)


class Pointwise(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, timestep, return_dict):
        return (self.layer(x),)


def test_the_scale_is_the_power_of_two_that_it_says():
    for exponent in torch.linspace(-30, 30, 61).tolist():
        v = [torch.full((5, 7), 0.7) * 10**exponent, -(torch.full((2,), 10.0) ** exponent)]
        factor = loss_scaling.scale(v)
        assert torch.frexp(factor).mantissa == 0.5  # exactly a power of two
        if exponent > -28:
            assert loss_scaling.TOTAL / 2 <= factor * sum(x.abs().sum() for x in v) < loss_scaling.TOTAL * (1 + 1e-6)
        assert torch.equal(v[0] * factor / factor, v[0])
    for nothing in (0.0, float("inf"), float("nan")):
        assert loss_scaling.scale([torch.full((3,), nothing)]) == 1


def test_gradients_are_added_to_those_that_stand_there():
    loop, _ = build(torch.float16)
    chain, found = loop.chain, []
    for before in (0.0, 1e-7):
        for p in chain.denoiser.parameters():
            p.grad = torch.full_like(p, before)
        Adjoint()(chain, loop.objective, Noise(2), BATCH)
        found.append(gradient(chain.denoiser) - before)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-13)


class Steep(nn.Module):
    """Harmless on the way forth; on the way back, sums overflow."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(1, 1, 1, bias=False) for _ in range(3)))
        for layer in self.layers:
            nn.init.constant_(layer.weight, 300.0)

    def forward(self, x, timestep, return_dict):
        return (self.layers(1e-7 * x),)


def test_an_overflow_stops_before_the_update_with_advice():
    denoiser = DiffusersDenoiser(Steep())
    denoiser.precision = torch.float16
    before = [p.clone() for p in denoiser.parameters()]
    chain = Chain(denoiser, table(N), (1, 8, 8))
    sgd = torch.optim.SGD(denoiser.parameters(), lr=1.0)
    loop = Nested(chain, Reward(lambda x: x.flatten(1).mean(1)), sgd, batch=BATCH, noise=Noise(0))
    with pytest.raises(
        NonFiniteError, match=r"before the update; the network computes in float16.*torch.bfloat16`, or float32"
    ):
        loop.step()
    assert all(torch.equal(p, b) for p, b in zip(denoiser.parameters(), before))
    sgd.zero_grad()
    denoiser.precision = None  # the same in float32 goes well
    Nested(chain, loop.objective, sgd, batch=BATCH, noise=Noise(0)).step()


def test_full_backpropagation_says_that_it_has_no_such_scale():
    loop, _ = build(torch.float16)
    with pytest.raises(InvalidInputError, match="float16 network; use Adjoint"):
        FullBackprop()(loop.chain, loop.objective, Noise(0), BATCH)
