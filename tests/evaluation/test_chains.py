"""What an evaluation draws: every start its own x_0, every trajectory its own noise, one condition per start."""

import torch
from torch import nn

from implicit_diffusion.denoisers.conditions import Drawn
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.table import ChainTable

F64 = torch.float64


class Told(nn.Module):
    """u = what the state is sampled under, or zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x, t, label=None):
        return 0 * x if label is None else self.weight * label[:, None].to(x.dtype).expand_as(x)


NONE = 1e-300  # of x_0: lost beside anything else


def one_row(*, noise, start=NONE, slope=0.0, condition=None):
    """x_1 = x_0 + slope·u + noise·ξ with x_0 of deviation `start`."""
    row = {name: torch.tensor([value], dtype=F64) for name, value in (("a", 1.0), ("b", slope), ("s", noise))}
    one = torch.ones(1, dtype=F64)
    table = ChainTable(**row, m=one, t=0 * one, h=one, initial_std=start)
    return Chain(Told(), table, (1,), condition=condition)


def reward(x, condition=None):
    return x.flatten(1).sum(1)


def test_chunks_have_starts_of_their_own():
    """Without noise x_1 is x_0: as many different ones as starts, the same for all repeats."""
    x = evaluate(one_row(start=1.0, noise=0.0), reward, Noise(0), starts=12, repeats=3, chunk=12).samples[..., 0]
    assert torch.equal(x, x[:, :1].expand_as(x)) and len(x[:, 0].unique()) == 12


def test_trajectories_have_noise_of_their_own():
    """Without a start x_1 is ξ: as many different ones as trajectories, in all chunks and repeats."""
    x = evaluate(one_row(noise=1.0), reward, Noise(0), starts=12, repeats=3, chunk=12).samples
    assert len(x.unique()) == 36


def test_the_condition_of_a_start_is_that_of_the_network_and_of_the_reward():
    """x_1 is the label under which the network was called; the reward gets the same, and all repeats of a start."""
    labels = Drawn("label", torch.arange(1, 50))
    chain, seen = one_row(noise=0.0, slope=1.0, condition=labels), []

    def watching(x, condition):
        seen.append(condition["label"])
        return reward(x)

    x = evaluate(chain, watching, Noise(0), starts=12, repeats=3, chunk=12).samples[..., 0]
    assert torch.equal(x, x[:, :1].expand_as(x)) and len(x.unique()) > 6
    assert torch.equal(x.flatten(), torch.cat(seen)[-36:].to(F64))  # after what the reward was tried on
