"""Where to put sensors, so that their measurements say most about where a source is?

    python examples/design.py

A source at z ~ N(0, I) in the plane is measured by five sensors: each sees the logarithm of an intensity that falls as
1/distance², with noise (Foster et al., arXiv 2103.02438). Their places are moved up the gradient of the information
gain by the single loop, and by prior contrastive estimation, a lower bound, at as many evaluations of the likelihood.
"""

import argparse

import torch

import implicit_diffusion as idf

parser = argparse.ArgumentParser(description="Place sensors around a source.")
parser.add_argument("--updates", type=int, default=400, help="Updates of the design.")
parser.add_argument("--outcomes", type=int, default=1500, help="Outcomes, and contrasts of each, to judge a design by.")
options, noise = parser.parse_args(), idf.Noise(0)


class Sensors(torch.nn.Module):
    """f(z; ξ)."""

    def __init__(self, key):
        super().__init__()
        self.places = torch.nn.Parameter(noise.normal((5, 2), 0, key))

    def forward(self, z):
        return torch.log(0.1 + 1 / (1e-4 + (z[:, None] - self.places).square().sum(2)))


def begin(key=0):
    experiment = idf.design.GaussianExperiment(Sensors(key), idf.GaussianMixture(torch.zeros(1, 2)), std=0.5)
    adam = torch.optim.Adam(experiment.signal.parameters(), lr=0.05)
    return experiment, idf.Update(adam, schedule=torch.optim.lr_scheduler.CosineAnnealingLR(adam, options.updates))


def judged(design):
    return idf.design.information_gain(design, noise.stream(1), outcomes=options.outcomes, contrasts=options.outcomes)


ours, update = begin()
kernel = idf.design.PosteriorKernel(idf.HMC(0.2, 2), ours, renewal=0.2)
# likelihoods per update: 125 pairs × 2 latents × (3 pulls of HMC + 1 exchange), and below 50 outcomes × (1 + 19)
loop = idf.Single(ours, kernel, idf.design.InformationGain(ours), update, particles=125, noise=noise.stream(2))
path = torch.stack([ours.signal.places.detach().clone() for _ in loop.run(options.updates)])
bound, update = begin()
for k in range(options.updates):
    update.optimizer.zero_grad()
    (-idf.design.contrastive_bounds(bound, noise.stream(3, k), 50, 19)[0].mean()).backward()
    update.optimizer.step(), update.schedule.step()

gains = {f"random {key}": judged(begin(key)[0]) for key in range(6)} | {"bound": judged(bound), "loop": judged(ours)}
for name, gain in gains.items():
    low, high, more = gain.lower, gain.upper, gain.over(gains["random 0"])
    print(f"{name:8} {low.mean:.2f} ± {low.error:.2f} to {high.mean:.2f} ± {high.error:.2f} nats", end=", ")
    print(f"{more.mean:+.2f} ± {more.error:.2f} over random 0")
print("loop over bound: {:+.2f} ± {:.2f}".format(*gains["loop"].over(gains["bound"])))
