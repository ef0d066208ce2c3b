"""Train an energy-based model on points, and report its log-likelihood in nats.

    python examples/energy_model.py                         # two arcs, three quarters of the points in the left one
    python examples/energy_model.py --data my_points.npy    # your own array, with shape (m, d)

The model is a Gaussian tilted by a network. Weighted particles follow it exactly while it is trained, and annealing
from the Gaussian gives its normaliser.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

import implicit_diffusion as idf

parser = argparse.ArgumentParser(description="Train an energy-based model on points.")
parser.add_argument("--data", type=Path, help="An array of points with shape (m, d), as written by numpy.save.")
parser.add_argument("--updates", type=int, default=240, help="Updates of the network.")
options = parser.parse_args()
noise = idf.Noise(0)


def two_arcs(points: int) -> torch.Tensor:
    angle, share = torch.rand((2, points), generator=noise.generator(0))
    side = torch.where(share < 0.75, -1.0, 1.0)
    angle = (angle - 0.5) * math.pi + torch.where(side < 0, math.pi, 0.0)
    return torch.stack([2 * side + angle.cos(), 2 * angle.sin()], 1) + 0.15 * noise.normal((points, 2), 1)


data = torch.from_numpy(np.load(options.data)).float() if options.data else two_arcs(2500)
data = data[torch.randperm(len(data), generator=noise.generator(2))]
held_out, data = data[: len(data) // 5], data[len(data) // 5 :]
mean, std = data.mean(0), data.std(0)
train, test = (data - mean) / std, (held_out - mean) / std

potential = idf.potentials.Tilted(idf.potentials.mlp(data.shape[1], noise.stream(3), width=32, depth=2), data.shape[1:])
adam = torch.optim.Adam(potential.parameters(), lr=2e-2, betas=(0.9, 0.99))
update = idf.Update(adam, schedule=torch.optim.lr_scheduler.CosineAnnealingLR(adam, options.updates))
kernel, likelihood = idf.HMC(0.12, leapfrogs=4), idf.ForwardKL(train, batch=512)
loop = idf.Single(potential, kernel, likelihood, update, particles=512, noise=noise.stream(4), weighted=True)
for metrics in loop.run(options.updates):
    if metrics["updates"] % (options.updates // 4) == 0:
        print("{updates:4} updates: nll {nll:.3f}, {ess:.0f} effective particles".format(**metrics))

log_z, log_z_se = idf.samplers.annealed(potential.tempered, kernel, 800, noise.stream(5), steps=60).log_z(potential)
with torch.no_grad():
    scores = -potential(test).double() - log_z - std.log().sum()
gaussian = torch.distributions.MultivariateNormal(mean, data.T.cov()).log_prob(held_out)
print(f"log Z = {log_z:.3f} ± {log_z_se:.3f}")
print(f"held-out log-likelihood {scores.mean():.3f} nats, of a Gaussian {gaussian.mean():.3f}")
