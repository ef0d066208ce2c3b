"""Which measurements tell benign from malignant tumours? Relevance of features, by the evidence.

    python examples/evidence.py

Logistic regression with a prior N(0, 1/τ_i) for the weight z_i of every feature: the τ that maximise p(labels; τ) say
which features matter. One loop moves particles z under the posterior, and τ along the gradient of the evidence.
"""

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from torch.distributions import Bernoulli, Normal

import implicit_diffusion as idf

parser = argparse.ArgumentParser(description="Relevance of features, by the evidence.")
parser.add_argument("--particles", type=int, default=400, help="Particles.")
parser.add_argument("--updates", type=int, default=400, help="Updates of the precisions.")
n, updates = vars(parser.parse_args()).values()
CHOSEN = ["mean radius", "mean texture", "mean smoothness", "mean symmetry"]


class Logistic(torch.nn.Module):
    """Labels under regression weights z, and θ = log τ."""

    def __init__(self, features):
        super().__init__()
        self.log_precision = torch.nn.Parameter(torch.zeros(features.shape[1]))
        self.register_buffer("features", features)

    def prior(self):
        return Normal(0.0, (-self.log_precision / 2).exp())

    def likelihood(self, z):
        return Bernoulli(logits=z @ self.features.T)


table = load_breast_cancer(as_frame=True)
features = torch.tensor(table.data[CHOSEN].to_numpy()[:200], dtype=torch.float32)
features = (features - features.mean(0)) / features.std(0)
model = Logistic(torch.cat([features, torch.ones(200, 1)], 1))  # and an intercept
V = idf.potentials.Posterior(model, torch.tensor(table.target.to_numpy()[:200], dtype=torch.float32))


def annealed(seed):
    return idf.samplers.annealed(lambda t: V.tempered(t**3), kernel, n, idf.Noise(seed), steps=200)


prior = V.tempered(0.0).sample(n, idf.Noise(0))
kernel, _ = idf.samplers.warm_up(idf.MALA(0.1), V, prior, idf.Noise(1))
start, adam = annealed(2), torch.optim.Adam(model.parameters(), lr=0.03)
print("log evidence at τ = 1: {:.2f} ± {:.2f}".format(*start.log_z(V)))
loop = idf.Single(V, kernel, idf.objectives.Evidence(), adam, particles=prior, noise=idf.Noise(3), weighted=True)
loop.refresh(start.particles(V))
*_, metrics = loop.run(updates)
print("after training: {:.2f}, by new particles {:.2f} ± {:.2f}".format(metrics["log_z"], *annealed(4).log_z(V)))
for name, precision in zip([*CHOSEN, "intercept"], model.log_precision.exp().tolist()):
    print(f"{name:15} weight ± {precision**-0.5:.2f}")
