"""The evidence of a model with latent variables: −log of the normaliser of the sampler's own potential.

Let V_θ(z) = −log p(data, z; θ). Its law is the posterior p(z | data; θ), and its normaliser the evidence, also called
marginal likelihood,

    Z_θ = ∫ e^{−V_θ(z)} dz = p(data; θ),        F = −log Z_θ = min_p G(p, θ),  G(p, θ) = E_p V_θ + ∫ p log p

G is minus the evidence lower bound, and sampling minimises it. So F is not a functional of the law that the sampler
finds, but the value of the problem that it solves. In p it is stationary: F′ = 0, nothing for an adjoint measure to do.
What remains is θ's direct effect (the envelope theorem; for this G, Fisher's identity),

    ∇_θ(−log Z_θ) = ∂_θ G(π_θ, θ) = E_{π_θ} ∇_θ V_θ

a charge +w_i on every particle, of total one: here the normalisers in V count, which all other objectives ignore.
"""

from __future__ import annotations

from implicit_diffusion.objectives.attributes import check_name
from implicit_diffusion.objectives.base import GibbsObjective
from implicit_diffusion.objectives.variation import Density, FirstVariation
from implicit_diffusion.particles import Particles


class Evidence(GibbsObjective):
    """−log ∫ e^{−V_θ(z)} dz, the negative log evidence of V_θ(z) = −log p(data, z; θ), in nats.

    The particles are latent variables z under the posterior; the data are part of V. `Posterior` makes V from a prior
    and a likelihood. A V of your own keeps every normaliser that depends on θ, such as −(d/2) log τ of a prior with
    precision τ: without it, Z is not the evidence, and nothing can tell (`check_normalised` can, from simulated data).

    The value is reported where weighted particles know log Z: after `loop.refresh(annealed(…).particles(V))`, or from
    the potential's own `log_z` at the start. Elsewhere metrics have `log_z_growth`, the log evidence gained.

        >>> import torch
        >>> from implicit_diffusion import MALA, Noise, Single
        >>> from implicit_diffusion.objectives import Evidence
        >>> class Noisy(torch.nn.Module):  # z ~ N(θ, 1), x = z + noise of variance 1, one observation x = 3
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.theta = torch.nn.Parameter(torch.zeros(()))
        ...
        ...     def forward(self, z):
        ...         return ((z[:, 0] - self.theta) ** 2 + (3 - z[:, 0]) ** 2) / 2
        >>> model, z = Noisy(), Noise(1).normal((500, 1))
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        >>> for metrics in Single(model, MALA(0.5), Evidence(), sgd, particles=z, noise=Noise(0)).run(200):
        ...     pass
        >>> print(f"{model.theta.item():.1f}")  # the maximum likelihood of x ~ N(θ, 2)
        3.0

    Args:
        name: under which metrics report the negative log evidence.

    Raises:
        InvalidInputError: a name that is not a word; in loops, particles that interact.
    """

    support, in_minimum = "none", 1.0
    separable = True

    def __init__(self, name: str = "neg_log_evidence") -> None:
        self.name = check_name(name)

    def first_variation(self, particles: Particles, density: Density) -> FirstVariation:
        """F′ = 0, and −log Z where it is known."""
        return FirstVariation(value=None if particles.log_z is None else -particles.log_z)
