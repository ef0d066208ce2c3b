"""The adjoint measure of a stationary law π_θ ∝ e^{−V_θ}, in closed form.

The law minimises G(p, θ) = KL(p‖π_θ), whose Hessian is δ_x(x′)/p(x). So (∇²_p G) ν = −F′ on measures of mass zero
(`implicit_diffusion.gradients.adjoint_measure`) has the solution

    ν = −(F′ − E_p F′) · p = −(μ − (∫dμ) p)  with μ = F′·p,         ∇F(π_θ) = ∇_θ ∫ V_θ dν

(Marion et al., arXiv 2402.05468, section 4.1; equally the score-function identity ∇_θ E_{π_θ} φ = −Cov(φ, ∇_θ V)). In
the second form F′ itself is not needed: outside of the particles, μ alone is (−p_ref for KL(p_ref‖p)).

**Unbiasedness.** Let x_1..x_n be independent draws from π_θ. Where μ lies on the particles, the plug-in estimate
Σ_i w_i (F′_i − Σ_j w_j F′_j) V_θ(x_i) is a covariance with a mean estimated from the same draws: it is too small by the
factor 1 − Σ w_i², which is 1 − 1/n for uniform weights, and is divided by it. Where μ lies on points that do not depend
on the particles, (∫dμ) p is an unbiased estimate already. (Weighted particles keep a bias of O(1/n), since their
weights are normalised, and so do functionals whose F′ depends on p.) Where processes share the particles, means and
Σ w_i² are those of all of them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.gradients.adjoint_measure import AdjointMeasure, AdjointSolver, Terms
from implicit_diffusion.objectives import FirstVariation
from implicit_diffusion.particles import Particles
from implicit_diffusion.rounding import exact
from implicit_diffusion.showing import Shown


class Gibbs(Shown, AdjointSolver):
    """ν = −(μ − (∫dμ) p), the solution for laws π_θ ∝ e^{−V_θ}.

    >>> import torch
    >>> from implicit_diffusion import GaussianMixture, Noise, Reward
    >>> from implicit_diffusion.gradients import Gibbs
    >>> from implicit_diffusion.particles import Particles
    >>> potential = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]))
    >>> particles = Particles(potential.sample(1000, Noise(0)))
    >>> variation = Reward(lambda x: x[:, 0]).first_variation(particles)
    >>> charges = Gibbs()(variation, particles).on_particles
    >>> (gradient,) = torch.autograd.grad(charges @ potential(particles.x), [potential.logits])
    >>> bool(gradient[1] < 0)  # descent raises the weight of the right mode
    True
    """

    separable = True
    supports = ("particles", "points", "both", "none")

    def __call__(self, variation: FirstVariation, particles: Particles) -> AdjointMeasure:
        """ν on the particles and on the outside points; see the module's text for the factor on the particles."""
        function, on_points = variation.function, variation.on_points
        if on_points is None:
            if function is None:
                return AdjointMeasure(particles.x.new_zeros(len(particles)))
            return AdjointMeasure(-unbiased_centred(function, particles).to(particles.x.dtype))
        charges = variation.mass_on_points * particles.weights
        if function is not None:
            charges = charges - unbiased_centred(function, particles).to(charges.dtype)
        return AdjointMeasure(charges, -on_points)

    def same_charges(self, terms: Terms) -> bool:
        """True where no measure lies on the particles: what they carry is spread evenly over uniform ones."""
        return all(term.support in ("points", "none") for _, term in terms)


def unbiased_centred(values: Float[Tensor, " n"], particles: Particles) -> Float[Tensor, " n"]:
    """w_i (values_i − Σ_j w_j values_j)/(1 − Σ_j w_j²), of total zero: for uniform weights (values_i − mean)/(n − 1).

    n, the weights and the mean are those of all processes' particles. Summed with other numbers it is their unbiased
    covariance, for independent particles of uniform weights. Computed in the device's widest dtype: V and rewards may
    share a large constant.
    """
    values = exact(values)
    if particles.log_weights is None:
        return (values - processes.mean(values.mean())) * (1 / (len(values) * processes.count() - 1))
    w = torch.softmax(exact(particles.log_weights), 0)
    own = processes.share(w)
    return own * (values - processes.total(own @ values)) / (1 - w.square().sum())
