"""The expected information gain as an objective: the mean free energy of an experiment's pairs, with the sign turned.

The gradient of −EIG is −E ∇_ξ V (`experiment`): every pair has the charge −1/n, and nothing else has any, since no law
is compared with another. All charges are the same, so that one pull through V serves the sampler and Γ
(`gradients.fused`).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from implicit_diffusion import processes
from implicit_diffusion.design.experiment import Experiment
from implicit_diffusion.design.pool import PAIR, Pool
from implicit_diffusion.design.posterior import PosteriorKernel
from implicit_diffusion.errors import InvalidInputError, check_type
from implicit_diffusion.evaluation.chains import Estimate, mean_and_error
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.objectives import Density, FirstVariation, GibbsObjective, Objective
from implicit_diffusion.objectives.attributes import check_name
from implicit_diffusion.objectives.variation import Support
from implicit_diffusion.particles import Particles
from implicit_diffusion.rounding import exact
from implicit_diffusion.samplers.kernel import Kernel


class InformationGain(GibbsObjective):
    """−EIG(ξ), for a loop over the pairs of an experiment.

        >>> import torch
        >>> from implicit_diffusion import MALA, GaussianMixture, Noise, Single
        >>> from implicit_diffusion.design import GaussianExperiment, InformationGain, PosteriorKernel
        >>> class Projection(torch.nn.Module):  # y = z_1 cos ξ + 3 z_2 sin ξ + ε: the second direction says more
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.angle = torch.nn.Parameter(torch.tensor(0.5))
        ...     def forward(self, z):
        ...         return z[:, 0] * self.angle.cos() + 3 * z[:, 1] * self.angle.sin()
        >>> experiment = GaussianExperiment(Projection(), GaussianMixture(torch.zeros(1, 2)), std=1.0)
        >>> kernel = PosteriorKernel(MALA(0.3), experiment)
        >>> adam = torch.optim.Adam(experiment.signal.parameters(), lr=0.02)
        >>> loop = Single(experiment, kernel, InformationGain(experiment), adam, particles=1000, noise=Noise(0))
        >>> for metrics in loop.run(150):
        ...     pass
        >>> print(f"{experiment.signal.angle.item():.1f}")  # π/2
        1.6

    The value itself is not known from pairs; `information_gain` estimates it.

    Args:
        experiment: the loop's potential.
        name: of the term.

    Raises:
        InvalidInputError: not an experiment; a name that is not a word.
    """

    support: ClassVar[Support] = "none"
    in_minimum = -1.0
    separable = True
    pool = PAIR

    def __init__(self, experiment: Experiment, name: str = "information_gain") -> None:
        check_type("experiment", experiment, Experiment, "use GaussianExperiment, or a subclass of Experiment")
        self.experiment, self.name = experiment, check_name(name)

    def first_variation(self, particles: Particles, density: Density) -> FirstVariation:
        """F′ = 0; the value is not known."""
        return FirstVariation()


class PooledInformationGain(InformationGain):
    """−EIG(ξ), for a loop over pools of several outcomes: the charges of pairs are −w_ij/(pools · G) instead of −1/n.

        >>> import torch
        >>> from implicit_diffusion import MALA, GaussianMixture, Noise, Single
        >>> from implicit_diffusion.design import GaussianExperiment, PooledInformationGain, Pool, PosteriorKernel
        >>> signal = torch.nn.Linear(1, 1, bias=False)  # y = ξ z + ε
        >>> _ = signal.weight.data.fill_(0.5)
        >>> experiment, pool = GaussianExperiment(signal, GaussianMixture(torch.zeros(1, 1)), std=1.0), Pool(10, 100)
        >>> kernel = PosteriorKernel(MALA(0.5), experiment, 1.0, pool)
        >>> objective = PooledInformationGain(experiment, pool)
        >>> sgd = torch.optim.SGD(signal.parameters(), lr=0.1)
        >>> loop = Single(experiment, kernel, objective, sgd, particles=2 * pool.size, noise=Noise(0))
        >>> for metrics in loop.run(20):
        ...     pass
        >>> bool(signal.weight > 0.6)  # a louder signal says more
        True

    Args:
        experiment: the loop's potential.
        pool: as the loop's `PosteriorKernel` has it.
        name: of the term.

    Raises:
        InvalidInputError: not an experiment or a pool; a name that is not a word; in loops, particles that are not
            whole pools.
    """

    support = "particles"

    def __init__(self, experiment: Experiment, pool: Pool, name: str = "information_gain") -> None:
        super().__init__(experiment, name)
        check_type("pool", pool, Pool, "use Pool(outcomes, samples)")
        self.pool = pool

    def first_variation(self, particles: Particles, density: Density) -> FirstVariation:
        """What makes the charges −w_ij/(pools · G); the value is not known.

        An F′ with the mean c adds −(F′_i − c)/(n − 1) to the charges −1/n (`gradients.gibbs`): with
        F′ = (n − 1) w_ij/(pools · G), whose mean is (n − 1)/n, they become −w_ij/(pools · G).
        """
        n, w = len(density.energy) * processes.count(), self.pool.weights(exact(density.energy))
        return FirstVariation(function=(n - 1) * self.pool.samples / n * w.flatten())


def lag(experiment: Experiment, particles: Particles) -> Estimate:
    """E[log p(y|z, ξ) − log p(y|z′, ξ)] over pairs, with its standard error: zero where z′ ~ p(·|y, ξ).

    Then z and z′ have the same law given y. Contrasts that lag behind ξ explain their outcomes worse than z does, and
    the lag is positive; like any mean over particles it is zero within its error only.

    Args:
        experiment: at the present design.
        particles: pairs, e.g. a loop's; in pools of several outcomes z′ has another law, and no lag.

    Raises:
        InvalidInputError: particles that are not pairs of this experiment.
    """
    check_type("experiment", experiment, Experiment, "use GaussianExperiment, or a subclass of Experiment")
    check_type("particles", particles, Particles, "use the particles of a loop")
    with torch.no_grad(), eval_mode(experiment):
        return mean_and_error(experiment.surprise(particles.x))


def check_experiment(potential: object, kernel: Kernel, objective: Objective) -> None:
    """Check the parts of a loop that belong to an experiment.

    Raises:
        InvalidInputError: an experiment with a kernel that would move (z, ε), or with another objective than its
            information gain, whose charges are those of a law e^{−V}/Z; such a kernel or objective without it.
    """
    terms = [term for _, term in objective.stationary]
    experiments = [kernel.experiment] if isinstance(kernel, PosteriorKernel) else []
    experiments += [term.experiment for term in terms if isinstance(term, InformationGain)]
    if not isinstance(potential, Experiment):
        if experiments:
            raise InvalidInputError(
                f"potential must be the experiment that PosteriorKernel and InformationGain were given, got "
                f"{type(potential).__name__}"
            )
        return
    if not isinstance(kernel, PosteriorKernel):
        raise InvalidInputError(
            f"kernel must leave the outcomes of an experiment as they are: use PosteriorKernel({kernel!r}, experiment)"
        )
    if others := [term.name for term in terms if not isinstance(term, InformationGain)]:
        raise InvalidInputError(
            f"objective of an experiment must be its InformationGain, got {', '.join(others)}: the pairs' law is not "
            "that of a single potential, and has no other gradient here"
        )
    if any(experiment is not potential for experiment in experiments):
        raise InvalidInputError("PosteriorKernel and InformationGain must be given the loop's own experiment")
    pools = [term.pool for term in terms if isinstance(term, InformationGain)]
    if any(pool != kernel.pool for pool in pools if max(pool.outcomes, kernel.pool.outcomes) > 1):
        raise InvalidInputError(
            f"PosteriorKernel's pool must be that of the objective: use PooledInformationGain(experiment, pool) with "
            f"{kernel.pool!r}"
        )
