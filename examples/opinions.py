"""Opinions that attract each other: which messages bring two camps together?

    python examples/opinions.py

Every opinion x is drawn to one of two camps and to opinions that are close to it; the rest is noise. Messages at five
places of the line bend the potential, and their strengths θ are trained so that opinions spread less, at a price. The
law of the opinions is a fixed point, p ∝ exp(−(V_θ + ∫W(·, y) p(dy))/τ): θ acts through V, and through what agents do
to each other. Implicit differentiation of the fixed point, a linear solve on the agents, takes both into account.
"""

import argparse

import torch
from torch import nn

import implicit_diffusion as idf

parser = argparse.ArgumentParser(description="Bring two camps of opinions together.")
parser.add_argument("--agents", type=int, default=400, help="Agents.")
parser.add_argument("--updates", type=int, default=300, help="Updates of the messages.")
options = parser.parse_args()
PLACES = torch.linspace(-2, 2, 5)


class Messages(nn.Module):
    """V(x) = (x² − 2)²/8 − Σ_i θ_i e^{−(x − c_i)²}: two camps at ±√2, and messages that draw to their places."""

    def __init__(self):
        super().__init__()
        self.strengths = nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return (x[:, 0] ** 2 - 2) ** 2 / 8 - torch.exp(-((x - PLACES) ** 2)) @ self.strengths


def attraction(x, y):
    return -0.5 * torch.exp(-((x[:, None, 0] - y[None, :, 0]) ** 2))


def spread(x, w):
    return w @ x[:, 0] ** 2 - (w @ x[:, 0]) ** 2


opinions = idf.potentials.MeanField(Messages(), attraction, temperature=0.3)
agents = 1.5 * idf.Noise(1).normal((options.agents, 1))
price = 0.1  # of a message, per unit of strength squared: a weight decay of twice as much
sgd = torch.optim.SGD(opinions.parameters(), lr=0.2, weight_decay=2 * price)
objective = idf.objectives.Functional(spread, name="spread")
loop = idf.Single(opinions, idf.ULA(0.05), objective, sgd, particles=agents, noise=idf.Noise(0))

course = [float(metrics["spread"]) for metrics in loop.run(options.updates)]
tenth = max(1, len(course) // 10)
print(f"spread {sum(course[:tenth]) / tenth:.2f} → {sum(course[-tenth:]) / tenth:.2f}")
print("messages", " ".join(f"{c:+.0f}: {s:+.2f}" for c, s in zip(PLACES, opinions.potential.strengths.tolist())))
