"""The parameter step takes Γ and nothing else: what lay in `.grad`, what went wrong before, and what trains layers."""

import copy
import warnings

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.loops import Nested, Queue, Single, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, Reward
from implicit_diffusion.potentials import Tilted
from implicit_diffusion.samplers import ULA
from implicit_diffusion.samplers.chain import Chain
from tests.helpers import chain_loops, gibbs_loops
from tests.helpers.oracles import affine_chain, table

F64 = torch.float64
CHAINS = {"queue": chain_loops.build, "nested": chain_loops.build}
PARTICLES = ("ula", "nested", "unrolled")


def build(name):
    if name in CHAINS:
        return CHAINS[name](name)[0]
    return gibbs_loops.build(name)


@pytest.mark.parametrize("name", [*CHAINS, *PARTICLES])
@pytest.mark.parametrize("left", [5.0, float("nan")])
def test_gradients_of_others_are_dropped(name, left):
    clean, stained = build(name), build(name)
    for _ in range(8):
        for p in stained.model.parameters():
            p.grad = torch.full_like(p, left)
        clean.step(), stained.step()
    for a, b in zip(clean.model.parameters(), stained.model.parameters()):
        assert torch.equal(a, b)


def test_after_an_error_the_gradient_is_gone():
    """The step that failed is as if it had not been: what comes next starts from the last good θ without its NaN."""
    loop = gibbs_loops.build("ula")
    loop.step()
    good, theta = loop.objective, [p.detach().clone() for p in loop.model.parameters()]
    loop.objective = Reward(lambda x: x[:, 0] / 0)
    with pytest.raises(NonFiniteError):
        loop.step()
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(loop.model.parameters(), theta))
    loop.objective = good
    assert loop.step()["grad_norm"].isfinite() and all(p.isfinite().all() for p in loop.model.parameters())


def test_an_update_serves_one_loop():
    chain, reward = affine_chain(4, 2)
    update = Update(torch.optim.SGD(chain.denoiser.parameters(), lr=0.1))
    Queue(chain, Reward(reward), update, batch=2, noise=Noise(0))
    with pytest.raises(InvalidInputError, match="already serves another loop"):
        Queue(chain, Reward(reward), update, batch=2, noise=Noise(0))


def test_spectral_norms_stay_at_one():
    """Evaluation mode would leave the power iteration out, and the layer would divide by the norm of old weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.utils.parametrizations.spectral_norm(nn.Linear(d, 16)) for d in (2, 16)]
        net = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), nn.Linear(16, 1)).double()
    potential = Tilted(net, (2,))
    data = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=F64) + 1
    adam = torch.optim.Adam(potential.parameters(), lr=1e-2)
    loop = Single(potential, ULA(0.1), ForwardKL(data), adam, particles=data, noise=Noise(0))
    for _ in range(200):
        loop.step()
    assert not loop.update.optimizer_only
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.detach(), 2) == pytest.approx(1, abs=0.02)
        assert not layer.training or layer.parametrizations.weight[0].training  # modes are as they were


class Breaks(torch.optim.SGD):
    """Moves θ, keeps a count, and then fails: raises, or makes one entry NaN, at its third step."""

    def __init__(self, parameters, lr, raises):
        super().__init__(parameters, lr=lr, momentum=0.9)
        self.raises = raises

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        first = self.param_groups[0]["params"][0]
        self.state[first]["count"] = self.state[first].get("count", 0) + 1
        if self.state[first]["count"] == 3:
            self.state[first]["more"] = torch.ones(1)
            first.view(-1)[0] = float("nan")
            if self.raises:
                raise KeyboardInterrupt


def everything(loop):
    return {"model": loop.model.state_dict(), "update": loop.update.state_dict()}


def same(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("kind", ["nested", "queue"])
def test_half_a_step_is_none(kind, raises):
    """θ, moments, counts, schedule and average are those of the last good state, whatever a step did to them."""
    loop, _ = chain_loops.build(kind, optimizer=lambda p, lr: Breaks(p, lr, raises), ema_decay=0.9)
    loop.update.schedule = torch.optim.lr_scheduler.ExponentialLR(loop.update.optimizer, 0.9)
    while loop.update.updates < 2:
        loop.step()
    good = copy.deepcopy(everything(loop))
    message = r"the step of the optimizer, Breaks\(lr=0\.0081\), made 1 of 2 parameter tensors NaN.*θ was left"
    with pytest.raises(KeyboardInterrupt if raises else NonFiniteError, match=None if raises else message):
        loop.step()
    found = everything(loop)
    gradients = found["update"].pop("gradients"), good["update"].pop("gradients")
    assert gradients == (None, None) and same(found, good)


class Half(nn.Module):
    """V in float16, with a parameter whose gradient is exactly 0."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).half()
        self.idle = nn.Parameter(torch.zeros((), dtype=torch.float16))

    def forward(self, x):
        return self.net(x)[:, 0] + x.square().sum(1) / 2 + 0 * self.idle


FAILING = {
    r"Adam\(lr=0.001, eps=1e-08\).*eps is 0 in torch.float16: use eps=1e-4": lambda p: torch.optim.Adam(p),
    r"Adam\(lr=0.001, eps=0\).*use a positive eps": lambda p: torch.optim.Adam(p, eps=0.0),
    r"SGD\(lr=inf\).*use a smaller learning rate": lambda p: torch.optim.SGD(p, lr=float("inf")),
}


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("message", FAILING)
def test_optimizers_that_make_nan_of_sound_gradients(message, iterations):
    """Found when it is made, in words that name the optimizer; the same where several steps are made in one."""
    potential = Half() if "float16" in message else Half().float()
    first = next(potential.parameters())
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1)).to(first.dtype)
    before = copy.deepcopy(potential.state_dict())
    loop = Single(
        potential,
        ULA(0.1),
        Reward(lambda x: x[:, 0]),
        FAILING[message](potential.parameters()),
        particles=x,
        noise=Noise(0),
        iterations=iterations,
    )
    with pytest.raises(NonFiniteError, match=f"the step of the optimizer, {message}"):
        loop.step()
    assert same(potential.state_dict(), before) and loop.update.updates == 0


def test_with_an_eps_that_float16_holds_it_trains():
    potential = Half()
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1)).half()
    adam = torch.optim.Adam(potential.parameters(), eps=1e-4)
    loop = Single(potential, ULA(0.1), Reward(lambda x: x[:, 0]), adam, particles=x, noise=Noise(0))
    for _ in range(3):
        loop.step()
    assert all(p.isfinite().all() for p in potential.parameters())


class Embedding(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(2, 2, sparse=sparse, _weight=torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=F64))

    def forward(self, x, t):
        return x * self.table((t > 1).long())


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"max_grad_norm": 0.1}])
def test_sparse_gradients_are_taken_as_what_they_are(settings):
    """Γ of an embedding is the same numbers whichever way torch keeps them."""
    found = []
    for sparse in (True, False):
        chain = Chain(Embedding(sparse), table(3), (2,))
        adam = torch.optim.Adam(chain.denoiser.parameters(), lr=0.1)
        loop = Queue(chain, Reward(lambda x: x.sum(1)), Update(adam, **settings), batch=2, noise=Noise(0))
        for _ in range(8):
            loop.step()
        found.append(chain.denoiser.table.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    with pytest.raises(InvalidInputError, match="SparseAdam takes sparse gradients alone"):
        Update(torch.optim.SparseAdam(Embedding(True).parameters()))


def test_an_average_of_a_network_with_hooks():
    """θ̄ has a hook of its own, which computes its weight from its own numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 1, bias=False))).double()
    net(torch.ones(1, 2, dtype=F64))
    update = Update(torch.optim.SGD(net.parameters(), lr=1.0), ema_decay=0.5)
    update.bind(net)
    x, seen = torch.ones(1, 2, dtype=F64), []
    for _ in range(3):
        net(x).sum().backward()
        update.step([], lambda: None)
        seen.append([p.detach().clone() for p in net.parameters()])
    (first, second), (third, fourth), (fifth, sixth) = seen
    g, v = (a / 4 + b / 4 + c / 2 for a, b, c in ((first, third, fifth), (second, fourth, sixth)))
    torch.testing.assert_close(update.ema.module(x), (g * v / v.norm() * x).sum().view(1, 1))


@pytest.mark.parametrize("name", [*CHAINS, *PARTICLES])
def test_what_moved_theta_stays_in_grad_until_the_next_step(name):
    loop = build(name)
    for _ in range(8):
        metrics = loop.step()
        held = [p.grad for p in loop.model.parameters() if p.grad is not None]
        if "grad_norm" in metrics:
            norm = torch.stack([g.norm() for g in held]).norm()
            torch.testing.assert_close(norm, metrics["grad_norm"], rtol=1e-5, atol=0)
        else:
            assert not held or loop.update.pending
    assert "grad_norm" in metrics


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 1e-3}, {"accumulate": 3}])
def test_it_is_what_the_optimizer_was_handed(settings):
    """θ⁺ = θ − η · .grad under plain SGD, clipped and averaged as it may be."""
    chain, reward = affine_chain(4, 2)
    update = Update(torch.optim.SGD(chain.denoiser.parameters(), lr=0.1), **settings)
    loop = Nested(chain, Reward(reward), update, batch=2, noise=Noise(0))
    before = [p.detach().clone() for p in loop.model.parameters()]
    *_, metrics = loop.run(1)
    for old, p in zip(before, loop.model.parameters()):
        torch.testing.assert_close(p.detach(), old - 0.1 * p.grad, rtol=1e-12, atol=1e-12)
    norm = torch.cat([p.grad.flatten() for p in loop.model.parameters()]).norm()
    expected = min(metrics["grad_norm"].item(), settings.get("max_grad_norm", float("inf")))
    assert norm.item() == pytest.approx(expected, rel=1e-3)  # clipping divides by the norm and a little
