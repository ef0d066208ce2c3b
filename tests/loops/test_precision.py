"""What single and half precision must not cost: V with a large constant, steps far from zero, terms that cancel."""

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.gradients import Gibbs
from implicit_diffusion.loops import NestedParticles, Single, Unrolled
from implicit_diffusion.loops.diagnostics import advice
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD, ForwardKL, ReverseKL, Reward, Sinkhorn
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials import GaussianMixture
from implicit_diffusion.samplers import HMC, MALA, ULA, Underdamped, resolution, warm_up
from implicit_diffusion.samplers.replicas import Replicas, annealed
from implicit_diffusion.samplers.resolution import CHECKED, check_resolved
from implicit_diffusion.samplers.simulation import simulate

F32, F64 = torch.float32, torch.float64
KERNELS = {"ula": ULA(0.1), "mala": MALA(0.3), "hmc": HMC(0.4, 2), "underdamped": Underdamped(0.1)}
WORD = "V is about .* resolves .* nats"


class Level(nn.Module):
    """C + ‖x − pull‖²/2 in eighths, which single precision holds exactly beside C = 2²⁰; the gradient is x − pull."""

    def __init__(self, constant=0.0):
        super().__init__()
        self.pull, self.constant = nn.Parameter(torch.tensor([0.5, -0.5])), constant

    def forward(self, x):
        v = (x - self.pull).square().sum(1) / 2
        return v + (self.constant + (8 * v).round() / 8 - v).detach()

    @property
    def log_z(self):
        return 1.75 - self.constant


def normal(n=64, seed=0, dtype=F32, d=2):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def single(potential, kernel, objective, *, lr=0.05, x=None, kind=Single, **settings):
    sgd = torch.optim.SGD([p for p in potential.parameters() if p.requires_grad], lr=lr)
    x = normal() if x is None else x
    return kind(potential, kernel, objective, sgd, particles=x, noise=Noise(0), **settings)


def leveled(constant, kernel, **settings):
    objective = Reward(lambda x: x[:, 0].tanh()) + ForwardKL(normal(9, 1)) + 0.1 * ReverseKL(Level())
    return single(Level(constant), kernel, objective, **settings)


@pytest.mark.parametrize("order", ["paper", "x-first"])
@pytest.mark.parametrize("weights", [{"weighted": True}, {"lag": True}, {}])
@pytest.mark.parametrize("name", ["ula", "mala", "hmc"])
def test_a_large_constant_in_v_changes_nothing_that_it_need_not(name, weights, order):
    """Acceptance, α, weights, log Z, lag and charges depend on differences of V, which are exact here."""
    plain = leveled(0.0, KERNELS[name], order=order, **weights)
    with pytest.warns(UserWarning, match=WORD):
        high = leveled(2.0**20, KERNELS[name], order=order, **weights)
    for _ in range(12):
        a, b = plain.step(), high.step()
    torch.testing.assert_close(high.weighted_state.x, plain.weighted_state.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(high.particles.weights, plain.particles.weights, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(high.model.pull, plain.model.pull, rtol=1e-4, atol=1e-5)
    assert a.keys() == b.keys()
    for key in ("nll", "ess", "lag", "acceptance", "reward", "grad_norm"):
        if key in a:
            assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-3, abs=1e-3), key
    if "log_z" in a:
        assert float(b["log_z"]) + 2.0**20 == pytest.approx(float(a["log_z"]), abs=1e-3)


def test_gradients_need_no_word_about_a_constant_but_values_do():
    single(Level(2.0**20), ULA(0.1), Reward(lambda x: x[:, 0]))  # warnings are failures here
    for settings in ({"kernel": MALA(0.1)}, {"kernel": ULA(0.1), "weighted": True}):
        with pytest.warns(UserWarning, match=f"{WORD}.*subtract a constant"):
            loop = single(Level(2.0**20), objective=Reward(lambda x: x[:, 0]), **settings)
        assert any("subtract a constant" in said for said in advice(loop, loop.step()))
    with pytest.warns(UserWarning, match=WORD):
        Replicas(MALA(0.1), Level(2.0**20), normal(), Noise(0))
    with pytest.warns(UserWarning, match=WORD):
        warm_up(MALA(0.5), Level(2.0**20), normal(), Noise(0))
    loop = single(Level(64.0), MALA(0.1), Reward(lambda x: x[:, 0]))
    assert not any("subtract a constant" in said for said in advice(loop, loop.step()))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_large_constant_in_a_reward_leaves_its_charges(weighted):
    x, logs = normal(), normal(d=1)[:, 0] if weighted else None
    eighths = (8 * x[:, 0]).round() / 8
    one, other = (
        Gibbs()(Reward(lambda x, c=c: eighths + c).first_variation(Particles(x, logs)), Particles(x, logs)).on_particles
        for c in (0.0, 2.0**20)
    )
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-8)
    assert abs(other.to(F64).sum()) < 1e-7


@pytest.mark.parametrize("kernel", [ULA(1e-3), MALA(1e-3)])
def test_the_drift_survives_far_from_zero(kernel):
    """h∇V is an eighth of the spacing of single precision there; the noise, which carries it, is six of them."""

    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.centre = nn.Parameter(torch.tensor(1e5))

        def forward(self, x):
            return (x - self.centre).square().sum(1) / 2

    *_, (last, info) = simulate(kernel, Far(), torch.full((2000, 2), 1e5 + 1), Noise(0), 300)
    moved = (last.x.to(F64) - 1e5).flatten()
    decay, kept = 0.999**300, float((info.acceptance if info.acceptance is not None else torch.ones(1)).mean())
    error = (1 - decay**2) ** 0.5 / len(moved) ** 0.5
    assert abs(moved.mean() - decay) < 4 * error + 0.01 * (1 - kept) < 0.25 * (1 - decay)
    assert moved.var() == pytest.approx(1 - decay**2, rel=4 * (2 / len(moved)) ** 0.5 + 0.01)


@pytest.mark.parametrize("name", KERNELS)
def test_steps_below_the_spacing_are_refused_and_later_a_word(name):
    kernel, potential, x = KERNELS[name], Level(), normal() + 1e8
    begin = {
        "single": lambda: single(potential, kernel, Reward(lambda x: x[:, 0]), x=x),
        "simulate": lambda: next(simulate(kernel, potential, x, Noise(0), 3)),
    }
    if kernel.weighted:
        begin["replicas"] = lambda: Replicas(kernel, potential, x, Noise(0))
    for call in begin.values():
        with pytest.raises(InvalidInputError, match=r"steps of \w+ move particles by about .*shift the data towards"):
            call()
    check_resolved(kernel, normal() + 1e4, 0)
    check_resolved(kernel, x.to(F64), 0)
    for k in (1, CHECKED - 1):
        check_resolved(kernel, x, k)
    with pytest.warns(UserWarning, match="steps are rounded away"):
        check_resolved(kernel, x, CHECKED)


def test_a_run_that_drifts_away_is_told_now_and_then(monkeypatch):
    monkeypatch.setattr(resolution, "CHECKED", 4)
    loop = single(Level(), ULA(lambda k: 0.1 if k < 3 else 1e-20), Reward(lambda x: x[:, 0]))
    for _ in range(4):
        loop.step()
    with pytest.warns(UserWarning, match="steps are rounded away"):
        loop.step()


OBJECTIVES = {
    "reward": lambda data: Reward(lambda x: x[:, 0].tanh()),
    "nll": ForwardKL,
    "kl": lambda data: ReverseKL.to_initial(Level().to(data.dtype)),
    "mmd": MMD,
    "sinkhorn": lambda data: Sinkhorn(data, 1.0),
}


@pytest.mark.filterwarnings("ignore:V is about")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32, F64], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_floating_dtype_runs_and_states_are_single_at_least(objective, dtype):
    wide = torch.promote_types(dtype, F32)
    for kernel in KERNELS.values():
        loop = single(Level().to(dtype), kernel, OBJECTIVES[objective](normal(12, 1, dtype)), x=normal(dtype=dtype))
        assert loop.weighted_state.x.dtype == loop.particles.x.dtype == wide
        loop.step()
        metrics = loop.step()
        assert loop.weighted_state.x.dtype == wide and loop.model.pull.dtype == dtype
        assert all(torch.as_tensor(v).isfinite() for v in metrics.values())
    for kind, steps in ((NestedParticles, {"inner_steps": 2}), (Unrolled, {"unrolled_steps": 2})):
        if kind is NestedParticles or objective in ("reward", "mmd", "sinkhorn"):
            loop = single(Level().to(dtype), ULA(0.1), OBJECTIVES[objective](normal(12, 1, dtype)), kind=kind, **steps,
                          x=normal(dtype=dtype))  # fmt: skip
            loop.step()


@pytest.mark.filterwarnings("ignore:V is about")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_particles_outside_of_loops(dtype):
    x, potential = normal(dtype=dtype), Level().to(dtype)
    _, moved = warm_up(MALA(0.3), potential, x, Noise(0), steps=20)
    replicas = Replicas(ULA(0.1), potential, x, Noise(0), groups=4)
    replicas.step(potential)
    held = replicas.particles(potential)
    *_, (last, _) = simulate(HMC(0.3), potential, x, Noise(0), 2)
    assert moved.dtype == held.x.dtype == last.x.dtype == F32
    mixture = GaussianMixture(torch.zeros(1, 2, dtype=dtype))
    assert annealed(lambda t: mixture, ULA(0.1), 16, Noise(0), steps=2).particles(mixture).x.dtype == F32


def test_half_precision_has_the_law_of_single():
    """E Var = 1 at rest: steps of h = 10⁻³ are below the spacing of bfloat16."""
    loop = single(Level().to(torch.bfloat16), ULA(1e-3), Reward(lambda x: x[:, 0]), lr=0.0, x=normal(1000))
    for _ in loop.run(200):
        pass
    assert loop.particles.x.var(0).mean().item() == pytest.approx(1, abs=4 / 1000**0.5)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_no_floating_point_number_is_refused_by_name(dtype):
    x = torch.ones(8, 2).to(dtype)
    for call in (
        lambda: single(Level(), ULA(0.1), Reward(lambda x: x[:, 0]), x=x),
        lambda: Replicas(ULA(0.1), Level(), x, Noise(0), groups=2),
        lambda: warm_up(MALA(0.1), Level(), x, Noise(0)),
        lambda: next(simulate(ULA(0.1), Level(), x, Noise(0), 1)),
    ):
        with pytest.raises(InvalidInputError, match="particles must be finite floating-point numbers, dense, got"):
            call()
    for build in (MMD, ForwardKL, lambda data: Sinkhorn(data, 1.0)):
        with pytest.raises(InvalidInputError, match="data must be floating-point numbers"):
            build(x)


@pytest.mark.parametrize("coefficients", [(0.1, 0.2, -0.3), (1.0, 1.0, -2.0), (1.0, 0.5, -0.5), (1.0, -0.999, 0.0)])
@pytest.mark.parametrize("n", [10, 64, 1000])
def test_data_terms_that_cancel(coefficients, n):
    """In single precision the update is that of double precision, and so are the particles."""

    def after(dtype):
        terms = [ForwardKL(normal(5, i, dtype) + i, name=f"{i}") for i in range(3)]
        mixture = GaussianMixture(torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=dtype))
        loop = single(
            mixture, ULA(1e-3), sum(c * t for c, t in zip(coefficients, terms)), x=normal(n, 4, dtype), lr=1.0
        )
        loop._draws = lambda k: (normal(n, 5, dtype), torch.zeros(()))
        metrics = loop.step()
        assert metrics["gradient_evaluations"] == (1 if coefficients[0] == 1 and coefficients[1] == 0.5 else 2)
        return torch.cat([p.detach().flatten() for p in mixture.parameters()]).to(F64), loop.weighted_state.x.to(F64)

    for found, right in zip(after(F32), after(F64)):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


class Embedded(nn.Module):
    """‖x − e‖²/2 with e in an embedding."""

    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.tensor([[0.3, -0.2], [1.0, 1.0]]), freeze=False, sparse=sparse)

    def forward(self, x):
        return (x - self.table(torch.zeros(len(x), dtype=torch.long))).square().sum(1) / 2


@pytest.mark.parametrize(("kind", "settings"), [
    (Single, {}), (Single, {"iterations": 2}), (NestedParticles, {"inner_steps": 2}), (Unrolled, {"unrolled_steps": 2})
])  # fmt: skip
def test_sparse_gradients_are_those_of_dense_ones(kind, settings):
    def trained(sparse):
        loop = single(Embedded(sparse), ULA(0.1), Reward(lambda x: x[:, 0].tanh()), kind=kind, **settings)
        loop.step(), loop.step()
        return loop.model.table.weight.detach()

    potential = Embedded(True)
    torch.testing.assert_close(trained(True), trained(False))
    assert not torch.equal(trained(True), potential.table.weight)
    with pytest.raises(InvalidInputError, match="SparseAdam takes sparse gradients alone"):
        sparse = torch.optim.SparseAdam(potential.parameters())
        Single(potential, ULA(0.1), Reward(lambda x: x[:, 0]), sparse, particles=normal(), noise=Noise(0))


class Walled(nn.Module):
    """‖x‖²/2 + pull·x where x_0 < 1, and infinite, or NaN, beyond, with a gradient of zero."""

    def __init__(self, beyond):
        super().__init__()
        self.pull, self.beyond = nn.Parameter(torch.zeros(2)), beyond

    def forward(self, x):
        return torch.where(x[:, 0] < 1, x.square().sum(1) / 2 + x @ self.pull, self.beyond)


LOOPS = {
    "paper": (Single, {}),
    "x-first": (Single, {"order": "x-first"}),
    "several": (Single, {"iterations": 2}),
    "nested": (NestedParticles, {"inner_steps": 2}),
    "unrolled": (Unrolled, {"unrolled_steps": 2}),
}


@pytest.mark.parametrize("beyond", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("name", LOOPS)
def test_v_that_is_not_finite_at_a_particle_stops_the_loop(name, beyond):
    kind, settings = LOOPS[name]
    loop = single(
        Walled(beyond), ULA(0.1), Reward(lambda x: x[:, 0].tanh()), x=normal().clamp(max=0.9), kind=kind, **settings
    )
    before = loop.model.pull.detach().clone()
    with pytest.raises(NonFiniteError, match=r"V is NaN or infinite at \d+ of 64 particles"):
        for _ in loop.run(50):
            before = loop.model.pull.detach().clone()
    if name != "several":
        assert torch.equal(loop.model.pull.detach(), before)


def test_v_that_is_not_finite_at_data_stops_the_loop_by_name():
    loop = single(Walled(float("inf")), ULA(0.001), ForwardKL(normal() + 1, name="outside"), x=normal().clamp(max=0.5))
    with pytest.raises(NonFiniteError, match=r"V is NaN or infinite at \d+ of 64 data of outside"):
        loop.step()


@pytest.mark.parametrize("name", ["mala", "hmc"])
def test_proposals_may_fall_where_v_is_infinite(name):
    loop = single(
        Walled(float("inf")), KERNELS[name], Reward(lambda x: x[:, 0].tanh()), x=normal().clamp(max=0.9), lr=0.0
    )
    for _ in loop.run(30):
        pass
    assert (loop.particles.x[:, 0] < 1).all()
