"""A step size that follows θ, to the acceptance it aims at by quadrature; exact weights; bit for bit after a resume."""

import math

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.loops import Single
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.callbacks.adapt import AdaptStep
from implicit_diffusion.runs.callbacks.watch import Watch
from implicit_diffusion.runs.fit import fit
from implicit_diffusion.samplers import HMC, MALA
from tests.helpers.gibbs_loops import F64, Follow, along_path, build, path
from tests.helpers.oracles_gibbs import Quartic, line, z_scores
from tests.loops.test_single import STEPS, expected


class Width(nn.Module):
    """V(x) = x² e^{−2θ}/2: a Gaussian with deviation e^θ."""

    def __init__(self, theta=0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta], dtype=F64))

    def forward(self, x):
        return (x * (-self.theta).exp()).square().sum(1) / 2


def acceptance(kernel, h):
    """E of the acceptance on N(0, 1), over a grid of position and noise. MALA's log ratio is h (x² − y²)/4."""
    z = torch.linspace(-6, 6, 601, dtype=F64)
    x, xi = torch.meshgrid(z, z, indexing="ij")
    weight = torch.softmax(-(x**2 + xi**2).flatten() / 2, 0)
    if isinstance(kernel, MALA):
        y = (1 - h) * x + math.sqrt(2 * h) * xi
        log_ratio = h * (x**2 - y**2) / 4
    else:
        y, p = x, xi
        for _ in range(kernel.leapfrogs):
            p = p - h / 2 * y
            y = y + h * p
            p = p - h / 2 * y
        log_ratio = (x**2 + xi**2 - y**2 - p**2) / 2
    return (weight @ log_ratio.exp().clamp(max=1).flatten()).item()


def root(kernel, target):
    """The h whose acceptance is the target, by bisection."""
    low, high = 1e-3, 2.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if acceptance(kernel, middle) > target else (low, middle)
    return low


def loop_at(kernel, thetas, n=1000, **options):
    """Particles drawn from the first law, while the deviation follows a path."""
    potential = Width(thetas[0].item())
    x = thetas[0].exp() * torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    optimizer = Follow(potential.theta, thetas)
    return Single(potential, kernel, Reward(lambda x: x[:, 0]), optimizer, particles=x, noise=Noise(0), **options)


KERNELS = {
    "mala": (MALA(0.7), 0.8),
    "hmc": (HMC(0.6, 1), None),
    "schedule": (HMC(lambda k: 2 / (k + 1) ** 0.02, 1), 0.9),
}


@pytest.mark.parametrize("name", ["schedule", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mala", "hmc"))])
def test_the_step_size_comes_to_the_acceptance_that_it_aims_at(name):
    """log h fluctuates by √(γ Var(a)/2|a′|), about 0.006 for 1000 particles; the mean over 80 updates by less."""
    kernel, target = KERNELS[name]
    h = root(kernel, target or 0.8)
    loop = loop_at(kernel, torch.zeros(1, 1, dtype=F64))
    adapt = AdaptStep(target, rate=0.1)
    sizes = [adapt.move(loop, loop.step()) for _ in range(160)]
    assert sizes[0] == kernel.step_size_at(0)
    found = torch.tensor(sizes[80:]).log().mean().item()
    assert abs(found - math.log(h)) < 0.03
    assert kernel.step_size_at(0) == KERNELS[name][0].step_size_at(0)  # the kernel, which may be shared, is unchanged


@pytest.mark.slow
def test_it_adapts_anew_when_theta_moves():
    """The law narrows by e^{−1.5}: HMC's step must shrink by as much; without adaptation nearly nothing is accepted."""
    moving = torch.cat([torch.zeros(50), torch.linspace(0, -1.5, 80), torch.full((100,), -1.5)])[:, None].to(F64)
    h, sizes, said = root(HMC(1.0, 1), 0.8), [], []
    options = {
        "callbacks": [AdaptStep(rate=0.2), lambda f: sizes.append(f.metrics["step_size"]), Watch(say=said.append)]
    }
    fit(loop_at(HMC(h, 1), moving), 220, **options)
    assert abs(math.log(sum(sizes[20:50]) / 30 / h)) < 0.05
    assert abs(math.log(sum(sizes[180:]) / 40 / h) + 1.5) < 0.05
    assert said == []


def test_a_step_size_that_no_longer_fits_is_said_once_and_so_is_that_it_fits_again():
    there = torch.linspace(0, -0.97, 40)
    moving = torch.cat([there, torch.full((20,), -0.97), there.flip(0)])[:, None].to(F64)
    said = []
    fit(loop_at(HMC(1.7, 1), moving), 110, callbacks=[Watch(every=5, say=said.append)])
    assert len(said) == 2
    assert "the step size no longer fits" in said[0] and "smaller step size" in said[0] and "AdaptStep" in said[0]
    assert "the step size fits again" in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mala", "hmc"])
def test_weighted_averages_stay_exact_while_the_step_size_adapts(name):
    """E φ and E Ẑ by quadrature along a path of θ, though h moves by the acceptance of the same particles."""
    thetas, rows, moved = path(STEPS), [], []
    start = line().law(Quartic(tuple(thetas[0].tolist())))[1]
    for seed in range(20):
        loop, adapt = (
            along_path({"mala": MALA(0.02), "hmc": HMC(1.6, 2)}[name], thetas, 1000, seed, weighted=True),
            AdaptStep(),
        )
        for _ in range(STEPS + 1):
            metrics = loop.step()
            adapt.move(loop, metrics)
        moved.append(loop.step_scale)
        rows.append(torch.stack([metrics["reward"], metrics["log_z_growth"].exp()]))
    rows = torch.stack(rows)
    ratio = line().law(Quartic(tuple(thetas[-1].tolist())))[1] - start
    truth = torch.tensor([expected(), math.exp(ratio)], dtype=F64)
    assert (rows.std(0) / math.sqrt(len(rows)) < torch.tensor([0.01, 0.03]) * truth).all()
    assert (z_scores(rows, truth).abs() < 4).all()
    assert all(scale > 2 if name == "mala" else scale < 0.9 for scale in moved)


@pytest.mark.parametrize("name", ["weighted mala", "weighted hmc, falling step", "nested, persistent"])
def test_a_resumed_run_goes_on_bit_for_bit(name, tmp_path):
    whole, first, second = build(name), build(name), build(name)
    fit(whole, 20, callbacks=[AdaptStep(), Watch(every=3)])
    directory = RunDirectory.create(tmp_path / "run")
    fit(first, 9, callbacks=[AdaptStep(), Watch(every=3)], directory=directory)
    fit(second, 20, callbacks=[AdaptStep(), Watch(every=3)], directory=directory)
    assert second.step_scale == whole.step_scale != 1 and second.step_size == whole.step_size
    assert torch.equal(second.weighted_state.x, whole.weighted_state.x)
    assert all(torch.equal(a, b) for a, b in zip(second.parameters, whole.parameters))
    earlier = {k: v for k, v in build(name).state_dict().items() if k != "step_scale"}
    second.load_state_dict(earlier)  # of a version without
    assert second.step_scale == 1


def test_the_gain_dies_out_where_it_may():
    """γ_k = k^{−2/3}, down to the rate: by hand, with everything accepted and a target of one half."""
    loop, adapt = build("weighted mala"), AdaptStep(0.5, rate=0.25)
    for _ in range(10):
        adapt.move(loop, {"acceptance": 1.0})
    assert math.log(loop.step_scale) == pytest.approx(0.5 * sum(max(k ** (-2 / 3), 0.25) for k in range(1, 11)))
    loop, adapt = build("weighted mala"), AdaptStep(0.5, rate=0)
    for _ in range(10):
        adapt.move(loop, {"acceptance": 0.0})
    assert math.log(loop.step_scale) == pytest.approx(-0.5 * sum(k ** (-2 / 3) for k in range(1, 11)))
    for _ in range(1000):
        AdaptStep(0.5, rate=1.0).move(loop, {"acceptance": 1.0})
    assert loop.step_scale == pytest.approx(1e6)  # V that is flat accepts everything


def test_refusals():
    with pytest.raises(InvalidInputError, match=r"target must lie in \(0, 1\).*got 1.5"):
        AdaptStep(1.5)
    with pytest.raises(InvalidInputError, match=r"rate must lie in \[0, 1\].*got -1"):
        AdaptStep(rate=-1)
    with pytest.raises(InvalidInputError, match=r"Single with ULA reports no acceptance.*use MALA or HMC"):
        fit(build("ula"), 1, callbacks=[AdaptStep()])
    with pytest.raises(InvalidInputError, match="NestedParticles with ULA reports no acceptance"):
        fit(build("nested"), 1, callbacks=[AdaptStep()])
