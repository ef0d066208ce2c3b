"""The parameter step in plain arithmetic: average, clip, step, schedule, moving average, in this order and no other."""

import itertools
import math

import pytest
import torch
from torch import nn

from implicit_diffusion.loops import NestedParticles, Single, Unrolled, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, Reward
from implicit_diffusion.samplers import ULA
from tests.oracles_gibbs import Location

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
