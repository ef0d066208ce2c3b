"""Weights and log Z of the present θ, particles that are replaced on the way, and contrastive divergence by hand."""

import math

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.loops import NestedParticles, Single
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD, ForwardKL, ReverseKL, Reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials import Tilted, energy_of, mlp
from implicit_diffusion.samplers import HMC, MALA, ULA
from implicit_diffusion.samplers.replicas import annealed
from tests.helpers.gibbs_loops import F64, along_path, build, path, wave
from tests.helpers.oracles_gibbs import Location, Quartic, estimate, line, z_scores

KERNELS = {"ula": ULA(0.12), "mala": MALA(0.4), "hmc": HMC(0.6, 2)}
DATA = torch.randn(60, 2, generator=torch.Generator().manual_seed(1), dtype=F64) + 1


def tilted_loop(kernel, lr=0.02, n=64, **settings):
    """Maximum likelihood of a tilted Gaussian on a few points of the plane."""
    potential = Tilted(mlp(2, Noise(0), width=8, depth=2).double(), (2,))
    adam = torch.optim.Adam(potential.parameters(), lr=lr)
    settings = {"weighted": True} | settings
    return Single(potential, kernel, ForwardKL(DATA, batch=32), adam, particles=n, noise=Noise(0), **settings)


def fresh(loop, seed=5):
    """Replicas of an annealing from the Gaussian to the loop's present potential."""
    return annealed(loop.model.tempered, HMC(0.5, 2), loop.n, Noise(seed), steps=10, groups=4)


@pytest.mark.parametrize("name", KERNELS)
def test_weights_and_log_z_belong_to_the_present_theta(name):
    """By hand: A + V_before(y) − V_now(y) for exact kernels, α_before(x, y) − α_now(y, x) for ULA."""
    loop, h = tilted_loop(KERNELS[name]), 0.12
    for _ in range(4):
        loop.step()
    w, before = loop.weighted_state, loop.model(loop.weighted_state.x)
    held, log_z0 = loop.particles, math.log(2 * math.pi)
    assert loop.log_z0 == pytest.approx(log_z0)
    if name == "ula":
        there, here = energy_of(loop.model, w.x), w.previous
        expected = w.log_weights + w.forward_part - there.value
        expected -= (there.grad * (here - w.x)).sum(1) / 2 + h / 4 * there.grad.square().sum(1)
    else:
        expected = w.log_weights + w.forward_part - before.detach()
    torch.testing.assert_close(held.log_weights, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(held.x, w.x)
    assert held.log_z.item() == pytest.approx(log_z0 + w.log_z.item() + expected.exp().mean().log().item(), rel=1e-12)
    metrics = loop.step()  # closes the same weights, before it moves
    assert metrics["log_z"].item() == pytest.approx(held.log_z.item(), rel=1e-12)
    assert metrics["ess"].item() == pytest.approx(held.ess.item(), rel=1e-12)


def test_without_weights_particles_carry_none():
    held = tilted_loop(ULA(0.1), weighted=False).particles
    assert held.log_weights is None and held.log_z is None and len(held) == 64


@pytest.mark.parametrize("name", KERNELS)
def test_a_refreshed_loop_holds_what_it_was_given(name):
    loop = tilted_loop(KERNELS[name])
    for _ in range(5):
        loop.step()
    found = fresh(loop)
    given = found.particles(loop.model)
    loop.refresh(given)
    held = loop.particles
    torch.testing.assert_close(held.x, given.x, rtol=0, atol=0)
    torch.testing.assert_close(held.weights, given.weights, rtol=1e-12, atol=1e-14)
    assert held.log_z.item() == pytest.approx(found.log_z(loop.model)[0], abs=1e-12)
    assert loop.weighted_state.log_weights.exp().mean().item() == pytest.approx(1, rel=1e-12)
    given.x.zero_()  # the loop keeps particles of its own
    torch.testing.assert_close(loop.particles.weights, held.weights, rtol=0, atol=0)
    metrics = loop.step()
    assert metrics["log_z"].item() == pytest.approx(held.log_z.item(), rel=1e-12)


def test_particles_without_weights_or_log_z():
    loop = tilted_loop(MALA(0.3))
    for _ in range(3):
        loop.step()
    before = loop.particles.log_z.item()
    assert before != pytest.approx(loop.log_z0, abs=1e-3)
    loop.refresh(Particles(torch.zeros(64, 2, dtype=F64)))
    assert not loop.weighted_state.log_weights.any() and loop.particles.log_z.item() == pytest.approx(before, rel=1e-12)
    plain = tilted_loop(MALA(0.3), weighted=False)
    plain.refresh(Particles(torch.ones(64, 2, dtype=F64)))
    assert (plain.particles.x == 1).all() and plain.particles.log_weights is None
    plain.step()


def test_where_log_z_is_unknown_only_its_growth_is_told():
    """A potential without log_z: no absolute number, and the KL to the start as with one."""
    loops = []
    for known in (True, False):
        potential = Location(torch.tensor([0.0], dtype=F64))
        if known:
            potential.log_z = math.log(2 * math.pi) / 2
        x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
        objective = ForwardKL(x + 1) + 0.5 * ReverseKL.to_initial(potential)
        sgd = torch.optim.SGD(potential.parameters(), lr=0.05)
        loop = Single(potential, MALA(0.3), objective, sgd, particles=x, noise=Noise(0), weighted=True)
        loops.append((loop, [loop.step() for _ in range(6)][-1]))
    (one, told), (other, less) = loops
    assert told.keys() - less.keys() == {"nll", "objective", "log_z"} and less.keys() - told.keys() == {"log_z_growth"}
    assert less["log_z_growth"].item() == pytest.approx(told["log_z"].item() - one.log_z0, abs=1e-12)
    assert less["kl_to_initial"].item() == pytest.approx(told["kl_to_initial"].item(), abs=1e-12)
    assert other.particles.log_z is None and other.particles.log_z_growth is not None
    other.refresh(Particles(other.particles.x, log_z=torch.tensor(3.0, dtype=F64)))  # somebody knows
    assert other.particles.log_z.item() == pytest.approx(3.0) and "log_z" in other.step()


def test_the_kl_to_another_start_is_not_measured_from_here():
    """A second loop does not know its log Z, and U is not what it began with: what is left is the estimate."""
    potential = Location(torch.tensor([0.0], dtype=F64))
    kl = ReverseKL.to_initial(potential)
    with torch.no_grad():
        potential.theta += 0.3
    x = potential.theta.detach() + torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    sgd = torch.optim.SGD(potential.parameters(), lr=0.0)
    loop = Single(potential, MALA(0.3), kl, sgd, particles=x, noise=Noise(0), weighted=True)
    assert loop.step()["kl_to_initial"].item() == pytest.approx(0.3**2 / 2, abs=4 * 0.3 / 20_000**0.5)


@pytest.mark.parametrize("found", [nn.Parameter(torch.zeros(())), torch.zeros(2), lambda: 0.0], ids=type)
def test_log_z_is_a_number(found):
    potential = Location(torch.tensor([0.0], dtype=F64))
    potential.__dict__["log_z"] = found
    with pytest.raises(InvalidInputError, match="log_z must be"):
        ReverseKL.to_initial(potential)


def test_a_reward_that_writes_into_its_argument_moves_no_particle():
    def careless(x):
        x[x < 0] = 0
        return x[:, 0]

    def careful(x):
        return x[:, 0].clamp(min=0)

    ends = []
    for reward in (careless, careful):
        loop = along_path(ULA(0.2), path(4), 64, 0, objective=Reward(reward))
        for _ in range(3):
            loop.step()
        ends.append(loop.weighted_state.x)
    assert torch.equal(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ula", "hmc"])
def test_averages_stay_exact_through_a_refreshment(name):
    """Weighted particles along a fast path, replaced half-way by weighted draws from another law."""
    thetas, rows, middle = path(8), [], 4
    for seed in range(16):
        loop = along_path(KERNELS[name], thetas, 500, seed, weighted=True)
        for k in range(9):
            if k == middle:
                here, proposal = loop.model, Quartic((0.2, 0.0))
                x = proposal.draw(500, torch.Generator().manual_seed(100 + seed))
                with torch.no_grad():
                    ratio = proposal(x) - here(x)
                log_z = torch.tensor(line().law(here)[1], dtype=F64)
                loop.refresh(Particles(x, ratio, log_z))
            metrics = loop.step()
        rows.append(torch.stack([metrics["reward"], metrics["log_z"].exp()]))
    end = Quartic(tuple(thetas[-1].tolist()))
    truth = torch.tensor([line().mean(end, wave), math.exp(line().law(end)[1])], dtype=F64)
    assert (z_scores(torch.stack(rows), truth).abs() < 5.6).all()  # Student's t of 15 degrees: as rare as 4 deviations


@pytest.mark.parametrize("name", KERNELS)
def test_a_refreshed_state_continues_bit_for_bit_through_a_file(name, tmp_path):
    whole, second = tilted_loop(KERNELS[name]), tilted_loop(KERNELS[name])
    for _ in range(4):
        whole.step()
    whole.refresh(fresh(whole).particles(whole.model))
    save_state(tmp_path, whole.state_dict())
    second.load_state_dict(load_state(tmp_path))
    for _ in range(6):
        a, b = whole.step(), second.step()
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    for one, other in zip(whole.weighted_state, second.weighted_state, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert torch.equal(whole.particles.log_z, second.particles.log_z)


BAD = {
    r"refresh needs \(64, 2\) particles.*got \(63, 2\)": Particles(torch.zeros(63, 2, dtype=F64)),
    r"refresh needs \(64, 2\) particles.*got \(64, 3\)": Particles(torch.zeros(64, 3, dtype=F64)),
    r"refresh needs .* torch.float64 .*got .* torch.float32": Particles(torch.zeros(64, 2)),
    "refresh needs finite": Particles(torch.full((64, 2), math.nan, dtype=F64)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_refresh_refuses(message):
    loop = tilted_loop(HMC(0.3, 2))
    before = loop.weighted_state
    with pytest.raises(InvalidInputError, match=message):
        loop.refresh(BAD[message])
    assert loop.weighted_state is before


def test_weights_are_refused_where_the_loop_does_not_weigh():
    weighted = Particles(torch.zeros(64, 2, dtype=F64), torch.zeros(64, dtype=F64))
    with pytest.raises(InvalidInputError, match="with weights only in a loop with weighted=True"):
        tilted_loop(HMC(0.3, 2), weighted=False).refresh(weighted)


def contrastive(objective, n=40, inner=3, begin="data", **settings):
    potential = Location(torch.tensor([0.4, -0.2], dtype=F64), stiffness=1.5)
    sgd = torch.optim.SGD(potential.parameters(), lr=0.1)
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    return NestedParticles(
        potential, ULA(0.2), objective, sgd, particles=x, noise=Noise(0), inner_steps=inner, begin=begin, **settings
    )


@pytest.mark.parametrize("batch", [40, None])
def test_contrastive_divergence_by_hand(batch):
    """T steps from the very data of the estimate, E_data ∇V − E_particles ∇V = s (mean particle − mean datum)."""
    data = DATA if batch else DATA[:40]
    loop, theta, inner = contrastive(ForwardKL(data, batch=batch)), torch.tensor([0.4, -0.2], dtype=F64), 3
    for outer in range(3):
        (drawn,) = loop._points(outer)
        x = drawn
        for k in range(outer * inner, (outer + 1) * inner):
            x = x - 0.2 * 1.5 * (x - theta) + math.sqrt(0.4) * loop._draws(k)[0]
        theta = theta - 0.1 * 1.5 * (x.mean(0) - drawn.mean(0))
        metrics = loop.step()
        torch.testing.assert_close(loop.weighted_state.x, x, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(loop.model.theta.data, theta, rtol=1e-11, atol=1e-13)
    assert metrics["gradient_evaluations"] == 3 * (inner + 1) and metrics["updates"] == 3
    if batch is None:
        assert torch.equal(drawn, data)


def test_contrastive_divergence_of_a_sum_begins_at_its_data():
    objective = 0.5 * Reward(wave) + 2.0 * ForwardKL(DATA, batch=40)
    loop, theta = contrastive(objective, inner=1), torch.tensor([0.4, -0.2], dtype=F64)
    points = loop._points(0)
    x = points[1] - 0.2 * 1.5 * (points[1] - theta) + math.sqrt(0.4) * loop._draws(0)[0]
    fixed = ForwardKL(points[1])
    gamma = estimate(Location(theta, 1.5), 0.5 * Reward(wave) + 2.0 * fixed, x)
    loop.step()
    torch.testing.assert_close(loop.model.theta.data, theta - 0.1 * gamma, rtol=1e-11, atol=1e-13)


def test_what_contrastive_divergence_refuses():
    with pytest.raises(InvalidInputError, match=r'begin="data" needs as many particles as data.*got 40 and 60.*batch'):
        contrastive(ForwardKL(DATA))
    with pytest.raises(InvalidInputError, match="got 40 and 39"):
        contrastive(ForwardKL(DATA, batch=39))
    for objective in (Reward(wave), MMD(DATA)):
        with pytest.raises(InvalidInputError, match=r'begin="data" needs an objective with data, such as ForwardKL'):
            contrastive(objective)


def test_begins_are_these_three():
    import inspect

    loop = build("nested")
    with pytest.raises(InvalidInputError, match=r"begin must be one of initial, last, data, got 'end'"):
        inspect.unwrap(NestedParticles.__init__)(
            NestedParticles.__new__(NestedParticles), loop.model, ULA(0.1), Reward(wave), loop.update.optimizer,
            particles=loop.weighted_state.x, noise=Noise(0), inner_steps=1, begin="end",
        )  # fmt: skip
