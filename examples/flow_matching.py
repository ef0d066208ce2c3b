"""A flow-matching model of your own, points on a ring, for the command line.

    cd examples
    implicit-diffusion finetune --model flow_matching.py:ring --reward flow_matching.py:right --out run
    implicit-diffusion sample --model run/model --num 500 --out ring.png

A factory must return the same weights at every call: the first one trains them, in seconds, and keeps them.
"""

import math
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

import implicit_diffusion as idf

KEPT = Path(__file__).with_suffix(".safetensors")


class Velocity(torch.nn.Sequential):
    """u(x, t) = E[ε − data | x], x = (1 − σ) data + σ ε, with t = 1000 σ as the scheduler has it."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat([x, t[:, None] / 1000], 1))


def ring(updates: int = 2000) -> idf.DiffusionModel:
    """Points at radius 1.5."""
    noise, linear, act = idf.Noise(0), torch.nn.Linear, torch.nn.SiLU()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Velocity(linear(3, 128), act, linear(128, 128), act, linear(128, 2))
    adam = torch.optim.Adam(network.parameters(), lr=2e-3)
    for update in range(0 if KEPT.exists() else updates):
        angle, sigma = torch.rand((2, 512, 1), generator=noise.generator(update, 0))
        data = 1.5 * torch.cat([(2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()], 1)
        eps = noise.normal(data.shape, update, 1)
        loss = (network((1 - sigma) * data + sigma * eps, 1000 * sigma[:, 0]) - (eps - data)).square().mean()
        adam.zero_grad(), loss.backward(), adam.step()
    KEPT.exists() or save_file(network.state_dict(), KEPT)
    network.load_state_dict(load_file(KEPT))
    return idf.DiffusionModel(network, FlowMatchEulerDiscreteScheduler(), (2,))


def right(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0]
