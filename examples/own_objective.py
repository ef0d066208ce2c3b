"""Write an objective of your own, and check its gradient against two closed forms.

    python examples/own_objective.py --particles 100000

The objective wants the soft maximum S(p) = (1/a) log E_p e^{a x} to be c: F(p) = (S(p) − c)²/2. For p = N(m, v),
S = m + a v/2. A potential and a denoising chain with Gaussian laws therefore have exact gradients. One definition
serves both: potentials differentiate its value in the weights of the particles, chains in their positions.
"""

import argparse
import math

import torch

import implicit_diffusion as idf

parser = argparse.ArgumentParser(description="Check an objective against closed forms.")
parser.add_argument("--particles", type=int, default=100_000, help="Particles, and trajectories, of all estimates.")
n, seeds = parser.parse_args().particles // 10, range(10)  # ten independent estimates give the standard error
a, c, mean, std = 0.5, 1.0, 0.3, 0.8


class SoftMaximum(idf.objectives.TerminalObjective):
    """(S(p) − c)²/2, of events with one number."""

    name = "soft_maximum"

    def value(self, particles: idf.Particles) -> torch.Tensor:
        return ((particles.weights.log() + a * particles.x[:, 0]).logsumexp(0) / a - c) ** 2 / 2


def report(name: str, gammas: list[torch.Tensor], exact: float) -> None:
    gamma, error = torch.stack(gammas).mean().item(), torch.stack(gammas).std().item() / len(gammas) ** 0.5
    print(f"{name:9} Γ = {gamma:.4f} ± {error:.4f}, exactly {exact:.4f}: z = {(gamma - exact) / error:+.1f}")


gammas = []
for seed in seeds:
    potential = idf.GaussianMixture(torch.tensor([[mean]], dtype=torch.float64), std=std)  # one mode, N(mean, std²)
    still = torch.optim.SGD([potential.means], lr=0.0)  # a step leaves Γ in .grad
    idf.Single(potential, idf.MALA(0.5), SoftMaximum(), still, particles=n, noise=idf.Noise(seed)).step()
    gammas.append(potential.means.grad)
report("potential", gammas, mean + a * std**2 / 2 - c)

N, h, gammas = 8, 0.25, []  # Euler's scheme for the reverse SDE of data N(mean, 1) gives x_N ~ N(gain · mean, v)
gain = sum(2 * h * (1 - h) ** (j - 1) * math.exp(-j * h) for j in range(1, N + 1))
v = (1 - h) ** (2 * N) + (1 - (1 - h) ** (2 * N)) / (1 - h / 2)
for seed in seeds:
    net = idf.denoisers.GaussianDenoiser.ornstein_uhlenbeck(torch.tensor([mean], dtype=torch.float64), 1.0)
    chain, still = idf.Chain(net, idf.tables.ou_reverse_sde(N, N * h), (1,)), torch.optim.SGD(net.parameters(), lr=0.0)
    idf.Nested(chain, SoftMaximum(), still, batch=n, noise=idf.Noise(seed)).step()
    gammas.append(net.mean.grad)
report("chain", gammas, gain * (gain * mean + a * v / 2 - c))
