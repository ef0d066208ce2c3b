"""Energy-based models built by hand, not trained, with their log Z by quadrature, and the smallest training."""

import math

import torch

from implicit_diffusion.commands.ebm.config import Config
from implicit_diffusion.commands.ebm.summary import Summary
from implicit_diffusion.evaluation.quadrature import Quadrature
from implicit_diffusion.models.energy_model import Architecture, EnergyModel, Moves
from implicit_diffusion.noise import Noise

SMALL = {"width": 8, "leapfrogs": 2, "step_size": 0.3, "judge_steps": 20}
TINY = Config("eight-gaussians", steps=30, particles=32, refresh=10, lr=0.03, **SMALL)  # a training of a second
SHIFT, SCALE = torch.tensor([0.4, -0.3]), torch.tensor([0.6, 0.8])


def gaussian(event=(2,), shift=SHIFT, scale=SCALE, moves=None, kind="mlp"):
    """N(shift, diag(scale²)): a network of zeros, with the log Z of a standard Gaussian."""
    architecture = Architecture(kind, event, width=8, depth=2)
    potential = architecture.build(Noise(0)).eval().requires_grad_(False)
    particles = Noise(1).normal((64, *event))
    moves = moves or Moves("hmc", 0.4, 3)
    return EnergyModel(architecture, potential, shift, scale, moves, particles, potential.log_z, 0.0)


def bent(shift=SHIFT, scale=SCALE, moves=None):
    """A law of the plane that is no Gaussian."""
    model = gaussian(shift=shift, scale=scale, moves=moves)
    model.potential.network[-1].weight.data = 4 * Noise(2).normal((1, 8))
    log_z = Quadrature(shift, scale, half=8.0).log_density(model.potential)[1]
    assert abs(log_z - math.log(2 * math.pi)) > 0.03
    return model.with_log_z(log_z, 0.0)


def summary(**changes):
    """A summary whose numbers are zero, except for some."""
    names = ("log_z_estimate", "log_z_half", "nll_held_out", "nll_train", "nll_gaussian", "gain_over_gaussian")
    zeros = dict.fromkeys((*names, "overfit", *(f"{name}_se" for name in (*names, "overfit"))), 0.0)
    work = {"seconds": 0.0, "updates": 0, "gradient_evaluations": 0, "mmd2": 0.0, "advice": []}
    return Summary(**zeros | work | changes)
