"""Many independent estimates of a gradient, and how they compare with the exact one."""

import torch
from torch import nn

from implicit_diffusion.gradients.estimator import RowStates
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain
from tests.helpers.oracles import affine_chain, exact_terms, table


class TanhDenoiser(nn.Module):
    """A small network of x and t, away from every symmetry."""

    def __init__(self, dim=2, width=6):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim + 1, width), nn.Tanh(), nn.Linear(width, dim)).double()
        move(self, 0.5)

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None] / 4], 1))


def move(module, scale, seed=8):
    """Add normal numbers to the parameters."""
    for number, p in enumerate(module.parameters()):
        p.data += scale * Noise(seed).normal(p.shape, number, dtype=p.dtype)


def tanh_chain(num_steps=4, **options):
    """A chain on a small network that has moved from the pretrained one."""
    chain = Chain(TanhDenoiser(), table(num_steps), (2,), **options)
    move(chain.denoiser, 0.2, seed=9)
    return chain


def moved_affine_chain(num_steps=3, pretrained_rows=(2,), scale=0.2):
    """A linear Gaussian chain that has moved from the pretrained one, and a quadratic reward."""
    chain, reward = affine_chain(num_steps, 2, pretrained_rows=pretrained_rows)
    move(chain.denoiser, scale)
    return chain, reward


def exact_gradient(chain, reward, beta):
    """∇J of an affine chain, as one vector."""
    r, kl, _ = exact_terms(chain, reward)
    return vector(torch.autograd.grad(-r + beta * kl, list(chain.denoiser.parameters())))


def vector(tensors):
    return torch.cat([x.flatten() for x in tensors])


def estimates(estimator, chain, objective, *, batch, slots=1, count=200, seed=5, meanwhile=lambda: None):
    """Γ of `count` groups of trajectories, divided by the `slots` trajectories of a group, with shape (count, p).

    The trajectories of a group are pulled back in common calls. Between the way forward and the way back, `meanwhile`
    may move θ; it is put back afterwards.
    """
    noise, parameters, found = Noise(seed), list(chain.denoiser.parameters()), []
    for group in range(count):
        indices = range(group * slots, (group + 1) * slots)
        condition = chain.conditions(noise, batch, indices)
        states = [torch.stack([chain.initial(noise, batch, index) for index in indices])]
        with torch.no_grad():
            for row in range(chain.num_steps):
                xi = chain.innovation(noise, batch, indices, [row] * slots)
                states.append(chain.transition(states[-1], [row] * slots, condition=condition).push(xi))
            ends = zip(states.pop(), indices)
            carries = [estimator.turn(objective, chain.endpoint(x, noise, index))[0] for x, index in ends]
        carry = {name: torch.stack([each[name] for each in carries]) for name in carries[0]}
        before = [p.detach().clone() for p in parameters]
        meanwhile()
        chain.denoiser.zero_grad()
        for row in reversed(range(chain.num_steps)):
            at = RowStates(states[row], [row] * slots, indices, noise, condition)
            carry = estimator.pull(chain, objective, at, carry).carry
        found.append(vector(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters) / slots)
        for p, value in zip(parameters, before, strict=True):
            p.data.copy_(value)
    return torch.stack(found)


def z_scores(draws, exact, control=0.0):
    """Of the mean's projection on the exact gradient, of its worst entry; and the projection's relative error.

    Args:
        draws: independent estimates, with shape (count, p).
        exact: their mean, if they are unbiased.
        control: what has mean zero and is correlated with the draws, or another estimate's draws less its mean.
    """
    draws = draws - control
    moved = draws.std(0) > 0
    share, error = draws @ exact / exact.square().sum(), len(draws) ** -0.5
    each = (draws.mean(0) - exact)[moved] / (draws.std(0)[moved] * error)
    return ((share.mean() - 1) / (share.std() * error)).item(), each.abs().max().item(), (share.std() * error).item()
