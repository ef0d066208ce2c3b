"""What the single loop is compared with, by hand; compiled against eager; and every argument that is refused."""

import inspect
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from implicit_diffusion.compiled import Compiled
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.loops import NestedParticles, Single, Unrolled
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD, DriftPenalty, ForwardKL, Functional, PathKL, ReverseKL, Reward, Sinkhorn
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers import HMC, MALA, ULA, Underdamped
from tests.helpers.gibbs_loops import F64, build
from tests.helpers.oracles_gibbs import Harmonic, Location, estimate

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
THETA = torch.tensor([0.4, -0.2], dtype=F64)
DATA = torch.randn(9, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
SMOOTH = {
    "reward": Reward(lambda x: x.sin().sum(1)),
    "mmd": MMD(DATA),
    "sinkhorn": Sinkhorn(DATA, 2.0),
    "functional": Functional(lambda x, w: (w @ x.square() - 1).square().sum()),
    "sum": 0.5 * Reward(lambda x: x.sin().sum(1)) + 2.0 * MMD(DATA),
}


def location_loop(kind, kernel, objective, lr=0.1, **settings):
    potential = Location(THETA, stiffness=1.5)
    optimizer = torch.optim.SGD(potential.parameters(), lr=lr)
    return kind(potential, kernel, objective, optimizer, particles=X, noise=Noise(0), **settings)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("steps", [1, 4])
def test_unrolled_gradient_by_hand(name, steps):
    """On V = s‖x − θ‖²/2 a step is affine: x_K = r^K x_0 + (1 − r^K) θ + noise with r = 1 − hs."""
    h, s = 0.2, 1.5
    loop = location_loop(Unrolled, ULA(h), SMOOTH[name], unrolled_steps=steps)
    noise = [loop._draws(k)[0] for k in range(steps)]
    metrics = loop.step()
    x, r = X, 1 - h * s
    for xi in noise:
        x = r * x + h * s * THETA + math.sqrt(2 * h) * xi
    torch.testing.assert_close(loop.weighted_state.x, x, rtol=1e-12, atol=1e-13)
    x = x.requires_grad_()
    total = sum(c * term.value(Particles(x)) for c, term in SMOOTH[name].terms)
    slopes = torch.autograd.grad(total, x)[0].sum(0)
    torch.testing.assert_close(loop.model.theta.data, THETA - 0.1 * (1 - r**steps) * slopes, rtol=1e-7, atol=1e-9)
    assert metrics["objective"].item() == pytest.approx(total.item(), rel=1e-9)
    assert metrics["gradient_evaluations"] == 2 * steps


def test_unrolled_underdamped_by_hand():
    h, s, friction = 0.3, 1.5, 0.7
    loop = location_loop(Unrolled, Underdamped(h, friction), SMOOTH["reward"], unrolled_steps=3)
    theta = THETA.clone().requires_grad_()
    x, p, kept = X, loop.weighted_state.momentum, math.exp(-friction * h)
    for k in range(3):
        p = p - h * s * (x - theta)
        x = x + h / 2 * p
        p = kept * p + math.sqrt(1 - kept**2) * loop._draws(k)[0]
        x = x + h / 2 * p
    (gradient,) = torch.autograd.grad(-x.sin().sum(1).mean(), theta)
    loop.step()
    torch.testing.assert_close(loop.weighted_state.x, x.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(loop.weighted_state.momentum, p.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(loop.model.theta.data, THETA - 0.1 * gradient, rtol=1e-10, atol=1e-12)
    assert not loop.weighted_state.x.requires_grad and not loop.weighted_state.momentum.requires_grad


@pytest.mark.parametrize("begin", ["initial", "last"])
def test_nested_by_hand(begin):
    """T steps under one θ, then Γ at the last particles; again from X_0, or from where the last run ended."""
    h, s, inner = 0.2, 1.5, 3
    loop = location_loop(NestedParticles, ULA(h), SMOOTH["reward"], inner_steps=inner, begin=begin)
    x, theta = X, THETA
    for outer in range(3):
        x = X if begin == "initial" else x
        for k in range(outer * inner, (outer + 1) * inner):
            x = x - h * s * (x - theta) + math.sqrt(2 * h) * loop._draws(k)[0]
        theta = theta - 0.1 * estimate(Location(theta, s), SMOOTH["reward"], x)
        metrics = loop.step()
        torch.testing.assert_close(loop.weighted_state.x, x, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(loop.model.theta.data, theta, rtol=1e-11, atol=1e-13)
    assert metrics["gradient_evaluations"] == 3 * (inner + 1) and metrics["updates"] == 3


def test_runs_make_as_many_updates_as_asked():
    for name in ("weighted ula", "nested", "unrolled"):
        loop = build(name)
        assert [m["updates"] for m in loop.run(4)] == [1, 2, 3, 4] and not list(loop.run(4))


@pytest.mark.slow
def test_compiled_equals_eager():
    """In a process of its own: the tests' type checks cannot be traced."""
    names = ["plain", "ula", "weighted ula", "weighted mala", "underdamped", "weighted x-first"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.compiled_loops", *names], capture_output=True, text=True
    )
    if "compiler" in done.stderr and "not compiled" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0 and done.stdout.count("agrees") == len(names), done.stderr


def test_a_reward_that_leaves_torch_falls_back_with_a_reason():
    def outside(x):
        return torch.from_numpy(np.sign(np.asarray(x[:, 0].tolist())))

    loop, plain = build("ula", reward=outside, compiled=True), build("ula", reward=outside)
    with pytest.warns(UserWarning, match="not compiled, runs eagerly: "):
        loop.step()
    assert loop.compiled.reason and "\n" not in loop.compiled.reason
    plain.step()
    for a, b in ((loop.step(), plain.step()),):
        assert all(a[k] == b[k] for k in a)
    assert torch.equal(loop.weighted_state.x, plain.weighted_state.x)


def test_errors_of_the_function_itself_are_not_swallowed(monkeypatch):
    def fails(x):
        raise InvalidInputError("x is bad")

    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    compiled = Compiled(fails)
    if compiled.reason is None:
        with pytest.raises(InvalidInputError, match="x is bad"):
            compiled(torch.zeros(1))
        assert compiled.reason is None


class Mixing(Harmonic):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Flat(Harmonic):
    def forward(self, x):
        return super().forward(x).sum()


class Blind(Harmonic):
    def forward(self, x):
        return super().forward(x.detach()).detach() + 0 * self.unused


class Wrong32(Harmonic):
    def forward(self, x):
        return super().forward(x).float()


def single(potential=None, kernel=None, objective=None, update=None, kind=Single, particles=X, **settings):
    potential = Location(THETA) if potential is None else potential
    update = torch.optim.SGD(potential.parameters(), lr=0.1) if update is None else update
    objective = SMOOTH["reward"] if objective is None else objective
    return kind(potential, kernel or ULA(0.1), objective, update, particles=particles, noise=Noise(0), **settings)


def frozen():
    potential = Location(THETA)
    update = torch.optim.SGD(potential.parameters(), lr=0.1)
    potential.theta.requires_grad_(False)
    return single(potential, update=update)


def closure():
    potential = Location(THETA)
    return single(potential, update=torch.optim.LBFGS(potential.parameters()))


NAN = torch.where(torch.arange(40)[:, None] == 7, math.nan, X)
BAD = {
    "potential must return one number per particle": lambda: single(Flat()),
    "potential is not differentiable in x": lambda: single(Blind()),
    "potential must return the particles' dtype": lambda: single(Wrong32()),
    "potential mixes particles": lambda: single(Mixing()),
    "reward must return one number per sample": lambda: single(objective=Reward(lambda x: x)),
    "reward gives values that are NaN": lambda: single(objective=Reward(lambda x: (x[:, 0] - 99).log())),
    "reward must return the dtype": lambda: single(objective=Reward(lambda x: x[:, 0].float())),
    "particles must be finite floating-point": lambda: single(particles=NAN),
    "particles are torch.float32 on cpu, the potential's parameters torch.float64": lambda: single(particles=X.float()),
    "particles are torch.float64 on meta": lambda: single(particles=X.to("meta")),
    r"particles must have shape \(n, \*event\) with n ≥ 2 .*got \(0, 2\)": lambda: single(particles=X[:0]),
    r"particles must have shape \(n, \*event\) .*got \(40,\)": lambda: single(particles=X[:, 0]),
    "particles must be at least 2, got 0": lambda: single(particles=0),
    r"particles=10 needs a potential with a method sample\(n, noise\)": lambda: single(particles=10),
    "step_size must be positive": lambda: single(kernel=ULA(0.0)),
    r"data have event shape \(3,\), particles \(2,\)": lambda: single(
        objective=ForwardKL(torch.zeros(5, 3, dtype=F64))
    ),
    "ForwardKL: data are torch.float32": lambda: single(objective=ForwardKL(DATA.float())),
    "MMD: data have event shape": lambda: single(objective=MMD(DATA[:, :1])),
    "Sinkhorn: data have event shape": lambda: single(objective=Sinkhorn(DATA[:, :1], 1.0)),
    "ReverseKL: its potential must return": lambda: single(objective=ReverseKL(lambda x: x)),
    "optimizer holds none of the potential's parameters": lambda: single(
        update=torch.optim.SGD(Location(THETA).parameters(), lr=0.1)
    ),
    "every parameter of the potential that the optimizer holds is frozen": frozen,
    "optimizer LBFGS needs a closure": closure,
    "Underdamped has no increment of weights": lambda: single(kernel=Underdamped(0.1), weighted=True),
    "Underdamped has no increment of weights; ": lambda: single(kernel=Underdamped(0.1), lag=True),
    "PathKL is paid along a denoising chain": lambda: single(objective=SMOOTH["reward"] + 0.1 * PathKL()),
    "DriftPenalty is paid along a denoising chain": lambda: single(objective=SMOOTH["reward"] + DriftPenalty()),
    "inner_steps must be": lambda: single(kind=NestedParticles, inner_steps=0),
    "unrolled_steps must be": lambda: single(kind=Unrolled, unrolled_steps=0),
    "MALA accepts or rejects": lambda: single(kind=Unrolled, unrolled_steps=2, kernel=MALA(0.1)),
    "HMC accepts or rejects": lambda: single(kind=Unrolled, unrolled_steps=2, kernel=HMC(0.1)),
    "ForwardKL has no derivative in the particles": lambda: single(
        kind=Unrolled, unrolled_steps=2, objective=ForwardKL(DATA)
    ),
    "reward is not differentiable": lambda: single(
        kind=Unrolled, unrolled_steps=2, objective=Reward(lambda x: (x[:, 0] > 0).double())
    ),
}


@pytest.mark.parametrize("message", BAD, ids=lambda m: re.sub(r"\W+", " ", m)[:60])
def test_bad_input_is_refused_by_name(message):
    with pytest.raises(InvalidInputError, match=message):
        BAD[message]()


@pytest.mark.parametrize("kind", [ParticleLoop, Single, NestedParticles, Unrolled, ULA, MALA, HMC, Underdamped])
def test_constructors_are_written_out(kind):
    """Every argument by name and type, described in the docstring: `help` teaches."""
    parameters = inspect.signature(kind).parameters
    assert not {p.kind for p in parameters.values()} & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    for name, parameter in parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty
        assert re.search(rf"^ +{name}: ", inspect.getdoc(kind), re.MULTILINE), name


@pytest.mark.parametrize("option", ["weighted", "lag"])
@pytest.mark.parametrize(("kind", "steps"), [(NestedParticles, "inner_steps"), (Unrolled, "unrolled_steps")])
def test_loops_without_weights_have_no_argument_for_them(kind, steps, option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        single(kind=kind, **{steps: 2, option: True})


def test_what_the_run_time_type_checks_of_the_tests_would_catch_first():
    potential = Location(THETA)
    sgd = torch.optim.SGD(potential.parameters(), lr=0.1)
    arguments, settings = (potential, ULA(0.1), SMOOTH["reward"], sgd), {"particles": X, "noise": Noise(0)}
    with pytest.raises(InvalidInputError, match='order must be "paper" or "x-first"'):
        inspect.unwrap(Single.__init__)(Single.__new__(Single), *arguments, **settings, order="theta-first")
    with pytest.raises(InvalidInputError, match=r"particles (must be finite floating-point|are torch\.int64)"):
        inspect.unwrap(ParticleLoop.__init__)(
            Single.__new__(Single), *arguments, **(settings | {"particles": X.long()})
        )


def test_state_of_another_seed_is_refused():
    other = build("weighted ula", seed=1)
    with pytest.raises(InvalidInputError, match="seed"):
        other.load_state_dict(build("weighted ula").state_dict())
