"""The parameter step in plain arithmetic: average, clip, step, schedule, moving average, in this order and no other."""

import itertools
import math

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import NonFiniteError
from implicit_diffusion.loops import NestedParticles, Single, Unrolled, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, Reward
from implicit_diffusion.samplers import ULA
from tests.helpers.oracles_gibbs import Location

F64 = torch.float64
LR, DECAY, CALLS = 0.3, 0.9, 12


class Counted(nn.Module):
    """Two parameters, and a buffer and a counter that change from update to update."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -2.0], dtype=F64))
        self.b = nn.Parameter(torch.tensor([[0.5]], dtype=F64))
        self.register_buffer("seen", torch.zeros(3, dtype=F64))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


def gradients():
    """Γ of every call, of norms from far below to far above a bound of one."""
    sizes = torch.logspace(-2, 1, CALLS, dtype=F64)[torch.randperm(CALLS, generator=torch.Generator().manual_seed(0))]
    directions = nn.functional.normalize(torch.randn(CALLS, 3, generator=torch.Generator().manual_seed(1), dtype=F64))
    return sizes[:, None] * directions


@pytest.mark.parametrize("known", [False, True], ids=["", "norm known"])
@pytest.mark.parametrize(
    ("accumulate", "bound", "schedule", "decay"),
    list(itertools.product((1, 3), (None, 1.0), (False, True), (None, DECAY))),
)
def test_every_combination_by_hand(accumulate, bound, schedule, decay, known):
    model = Counted()
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    falling = torch.optim.lr_scheduler.LambdaLR(sgd, lambda k: 1 / (1 + k)) if schedule else None
    update = Update(sgd, schedule=falling, max_grad_norm=bound, ema_decay=decay, accumulate=accumulate)
    update.bind(model)
    theta, average, waiting, updates = torch.cat([model.a.detach(), model.b.detach()[0]]), None, [], 0
    for call, gamma in enumerate(gradients()):
        update.begin()
        model.seen += call + 1
        model.count += 1
        for p, g in zip((model.a, model.b), (gamma[:2], gamma[2:, None])):
            p.grad = g.clone() if p.grad is None else p.grad + g
        found = update.step([], lambda: None, gamma.norm() if known else None)
        waiting.append(gamma)
        if len(waiting) < accumulate:
            assert found == {}
            continue
        mean, waiting = torch.stack(waiting).mean(0), []
        lr = LR / (1 + updates) if schedule else LR
        clipped = mean * min(1.0, (bound or math.inf) / mean.norm().item())
        theta, updates = theta - lr * clipped, updates + 1
        average = theta if average is None else DECAY * average + (1 - DECAY) * theta
        assert found["grad_norm"].item() == pytest.approx(mean.norm().item(), rel=1e-12)  # before it was clipped
        assert found["lr"] == pytest.approx(lr, rel=1e-12) and update.updates == updates
        ours = [model] if update.ema is None else [model, update.ema.module]
        for module, expected in zip(ours, (theta, average)):
            parameters = torch.cat([module.a.detach(), module.b.detach()[0]])
            torch.testing.assert_close(parameters, expected, rtol=3e-6, atol=0)  # torch's bound has 1e−6 on the norm
            assert (module.seen == sum(range(call + 2))).all() and module.count == call + 1
    assert updates == CALLS // accumulate


class Recorder(torch.optim.SGD):
    """Plain SGD that remembers Γ, and stays where it is."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.gradients = []

    def step(self, closure=None):
        self.gradients.append(torch.cat([p.grad.flatten().clone() for g in self.param_groups for p in g["params"]]))
        super().step()


LOOPS = {
    "single": (Single, {}),
    "x-first": (Single, {"order": "x-first"}),
    "weighted": (Single, {"weighted": True}),
    "nested": (NestedParticles, {"inner_steps": 2, "begin": "last"}),
    "unrolled": (Unrolled, {"unrolled_steps": 2}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_particle_loops_average_what_they_accumulate(name):
    """θ stays, so that loops with and without accumulation see the same particles."""

    def recorded(accumulate, steps):
        potential = Location(torch.tensor([0.4, -0.2], dtype=F64), stiffness=1.5)
        x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
        kind, settings = LOOPS[name]
        objective = Reward(lambda x: x.sin().sum(1))
        if kind is not Unrolled:
            objective = objective + 0.5 * ForwardKL(x[:9] + 1, batch=4)
        optimizer = Recorder(potential.parameters())
        update = Update(optimizer, accumulate=accumulate)
        loop = kind(potential, ULA(0.2), objective, update, particles=x, noise=Noise(0), **settings)
        norms = [metrics["grad_norm"] for metrics in (loop.step() for _ in range(steps)) if "grad_norm" in metrics]
        return torch.stack(optimizer.gradients), torch.stack(norms)

    single, _ = recorded(1, 12)
    means, norms = recorded(3, 12)
    torch.testing.assert_close(means, single.view(4, 3, -1).mean(1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(norms, means.norm(dim=1), rtol=1e-12, atol=1e-14)
    assert (single.std(0) > 0.01 * single.abs().mean()).all()  # one of three for their mean would show


def test_an_error_drops_what_was_accumulated():
    """The average after it is that of three new gradients."""
    model = Counted()
    update = Update(torch.optim.SGD(model.parameters(), lr=1.0), accumulate=3)
    update.bind(model)

    def call(value, bad=None):
        update.begin()
        for p in model.parameters():
            p.grad = torch.full_like(p, value) if p.grad is None else p.grad + value
        return update.step([] if bad is None else [torch.tensor(bad)], lambda: "bad")

    call(5.0), call(5.0)
    with pytest.raises(NonFiniteError, match="bad; θ was left"):
        call(5.0, math.nan)
    assert update.pending == 0 and all(p.grad is None for p in model.parameters())
    assert [call(value) for value in (1.0, 2.0)] == [{}, {}]
    assert call(3.0)["grad_norm"].item() == pytest.approx(2 * 3**0.5)
    torch.testing.assert_close(model.a.detach(), torch.tensor([-1.0, -4.0], dtype=F64))


@pytest.mark.parametrize("training", [True, False])
def test_parametrized_layers_are_trained_once_and_left_in_their_mode(training):
    """One power iteration per update, whatever mode the layer is in; afterwards it is in that mode again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).double()
    layer.train(training)
    update = Update(torch.optim.SGD(layer.parameters(), lr=0.1))
    update.bind(layer)
    before = layer.parametrizations.weight[0]._u.clone()
    for p in layer.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    update.step([], lambda: None)
    assert not torch.equal(layer.parametrizations.weight[0]._u, before)
    assert all(part.training == training for part in layer.modules())


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_a_masked_step_is_the_step_or_nothing_at_all(kind):
    """Parameters and the optimizer's moments: as after a step, or bit for bit as before."""

    def fresh():
        model = Counted()
        options = {"momentum": 0.9} if kind == "SGD" else {}
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, **options)
        update = Update(optimizer)
        update.bind(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return model, update

    def held(model, update):
        moments = (t for state in update.optimizer.state.values() for t in state.values())
        return [t.detach().clone() for t in (*model.parameters(), *moments)]

    (model, update), (other, plain) = fresh(), fresh()
    gamma, bad = [torch.full_like(p, 0.3) for p in model.parameters()], torch.full((2,), math.nan, dtype=F64)
    before = held(model, update)
    update.masked(list(model.parameters()), [bad, gamma[1]], torch.tensor(False))
    for a, b in zip(held(model, update), before, strict=True):
        assert torch.equal(a, b)
    update.masked(list(model.parameters()), gamma, torch.tensor(True))
    for p, g in zip(other.parameters(), gamma):
        p.grad = g.clone()
    plain.optimizer.step()
    for a, b in zip(held(model, update), held(other, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("alarm", [math.inf, -math.inf, math.nan])
def test_steps_that_were_masked_are_not_counted(alarm):
    model = Counted()
    update = Update(torch.optim.SGD(model.parameters(), lr=0.1))
    update.bind(model)
    one = torch.tensor(1.0)
    assert update.account(one, lambda: None, one, 4)["grad_norm"] == 1 and update.updates == 4
    with pytest.raises(NonFiniteError, match="it was too large"):
        update.account(torch.tensor(alarm), lambda: "it was too large", one, 4)
    assert update.updates == 4


def test_a_step_that_its_numbers_cannot_hold_is_not_made():
    weight = nn.Parameter(torch.ones(2))
    update = Update(torch.optim.Adam([weight], lr=1e300))
    weight.grad = torch.ones(2)
    with pytest.raises(NonFiniteError, match=r"learning rate 1e[+]300"):
        update.step([], lambda: None)
    assert weight.tolist() == [1.0, 1.0] and update.updates == 0


def test_a_first_step_that_fails_leaves_an_optimizer_without_state():
    """As before the step: moments that it began with NaN would spoil all that come after."""
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.Adam([weight])  # eps is 0 in float16, and a gradient of zero gives 0/0
    weight.grad = torch.zeros(2, dtype=torch.float16)
    with pytest.raises(NonFiniteError, match="Adam"):
        Update(optimizer).step([], lambda: None)
    assert not optimizer.state and weight.tolist() == [1.0, 1.0]
