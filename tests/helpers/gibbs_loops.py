"""Loops over particles, built small; and an optimizer that drives θ along a path fixed in advance."""

import copy

import torch

from implicit_diffusion.loops import NestedParticles, Single, Unrolled, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, ReverseKL, Reward
from implicit_diffusion.samplers import HMC, MALA, ULA, Underdamped
from tests.helpers.oracles_gibbs import Banana, Quartic

F64 = torch.float64


class Follow(torch.optim.Optimizer):
    """Sets the parameter to path[k + 1] at its k-th step, whatever the gradient."""

    def __init__(self, parameter, path):
        super().__init__([parameter], {"lr": 1.0})
        self.path, self.k = path, 0

    @torch.no_grad()
    def step(self, closure=None):
        self.k += 1
        self.param_groups[0]["params"][0].copy_(self.path[min(self.k, len(self.path) - 1)])


def wave(x):
    return torch.tanh(x[:, 0])


def along_path(kernel, path, n, seed, objective=None, **settings):
    """A single loop on `Quartic` whose θ follows a path and whose X_0 is drawn exactly."""
    potential = Quartic(tuple(path[0].tolist()))
    x = potential.draw(n, torch.Generator().manual_seed(seed))
    objective = Reward(wave) if objective is None else objective
    return Single(
        potential, kernel, objective, Follow(potential.theta, path), particles=x, noise=Noise(seed), **settings
    )


def path(steps):
    """From one law to one that is some way off, never at rest."""
    t = torch.linspace(0, 1, steps + 1, dtype=F64)[:, None]
    return (1 - t) * torch.tensor([[-0.5, 0.5]]) + t * torch.tensor([[1.2, -1.0]])


BUILDS = {
    "ula": (Single, ULA(0.2), {}),
    "weighted ula": (Single, ULA(0.2), {"weighted": True}),
    "weighted mala": (Single, MALA(0.3), {"weighted": True}),
    "weighted hmc, falling step": (Single, HMC(lambda k: 0.4 / (k + 1) ** 0.1, 2), {"weighted": True}),
    "weighted, watched": (Single, ULA(0.2), {"weighted": True, "min_ess": 0.45}),
    "underdamped": (Single, Underdamped(0.2), {}),
    "ula with lag": (Single, ULA(0.2), {"lag": True}),
    "x-first": (Single, ULA(0.2), {"order": "x-first"}),
    "weighted x-first": (Single, ULA(0.2), {"order": "x-first", "weighted": True}),
    "weighted x-first mala": (Single, MALA(0.2), {"order": "x-first", "weighted": True}),
    "nested": (NestedParticles, ULA(0.2), {"inner_steps": 3}),
    "nested, persistent": (NestedParticles, MALA(0.2), {"inner_steps": 3, "begin": "last"}),
    "nested underdamped": (NestedParticles, Underdamped(0.2), {"inner_steps": 3, "begin": "last"}),
    "unrolled": (Unrolled, ULA(0.2), {"unrolled_steps": 3}),
    "unrolled underdamped": (Unrolled, Underdamped(0.2), {"unrolled_steps": 2}),
}


def build(name, *, n=64, lr=0.05, seed=0, dtype=F64, optimizer=torch.optim.Adam, reward=wave, **settings):
    kind, kernel, own = BUILDS[name]
    potential = Banana().to(dtype)
    x = potential.draw(n, torch.Generator().manual_seed(seed)).to(dtype)
    objective = Reward(reward)
    if kind is not Unrolled:
        data = torch.randn(9, 2, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)
        objective = objective + 0.3 * ForwardKL(data, batch=4) + 0.1 * ReverseKL.to_initial(potential)
    update = Update(optimizer(potential.parameters(), lr=lr), ema_decay=0.9)
    return kind(potential, copy.copy(kernel), objective, update, particles=x, noise=Noise(seed), **own, **settings)
