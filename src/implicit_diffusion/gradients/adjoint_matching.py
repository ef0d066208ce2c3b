r"""Adjoint matching: the adjoint with a lean carry, which knows the pretrained network's Jacobian alone.

The adjoint of a chain moves back by

    λ_k = (a_k + b_k J_θ)ᵀ λ_{k+1} + ∇_x c_k,        J_θ = ∂u_θ(m_k x, t_k)/∂x at x_k,

and a running cost c_k = φ_k(u_θ − u_0), as path KL and drift penalty are, has ∇_x c_k = (J_θ − J_0)ᵀ ∇φ_k. Hence

    λ_k = (a_k + b_k J_0)ᵀ λ_{k+1} + (J_θ − J_0)ᵀ [b_k λ_{k+1} + ∇φ_k(u_θ − u_0)].

The bracket is the gradient of what is still to be paid with respect to the prediction at x_k. Where u_θ(·, t_k) is the
best function of x_k, the mean of the bracket given x_k vanishes. Adjoint matching leaves the term out:

    λ̃_N = λ_N,        λ̃_k = a_k λ̃_{k+1} + ∇_x ⟨b_k λ̃_{k+1}, u_0(m_k x_k, t_k)⟩,
    Γ = Σ_k ∇_θ [⟨b_k λ̃_{k+1}, u_θ(m_k x_k, t_k)⟩ + mean c_k(x_k, θ)]        with the states held fixed.

With c_k the path KL, weighted by β, this is the gradient of the regression of b_k (u_θ − u_0)/s_k on −s_k B λ̃_{k+1}/β,
the mean over the batch of half the squared residual, times β. (Domingo-Enrich, Drozdzal, Karrer and Chen, *Adjoint
Matching*, arXiv 2409.08861.)

*Bias.* Γ is the adjoint's, sample by sample, where u_θ = u_0, as when training begins. It is unbiased where every
trained row is the best function of x_k there is: then E[λ̃_k | x_k] = E[λ_k | x_k], by induction from the end. In
between, and where the network is too small to reach that point, it is biased by what it leaves out. So it comes to rest
at the optimum of J itself, on every chain with noise. Whether that optimum makes the outputs π_0 e^{R/β} is another
matter: for that the chain must be memoryless, x_N independent of x_0 (`evaluation.memory_of_start` measures it).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import loss_scaling
from implicit_diffusion.gradients.adjoint import Adjoint, running_costs
from implicit_diffusion.gradients.estimator import Carry, Pulled, RowStates
from implicit_diffusion.gradients.footprint import Footprint, bytes_of, end_activations, row_activations
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers.chain import Chain


class AdjointMatching(Adjoint):
    """∇ℓ by the lean adjoint, over all rows. Needs the gradient of the reward; biased away from start and optimum.

    Each call evaluates u_0 as well as u_θ: without a running cost it costs more than `Adjoint`.
    """

    def check(self, chain: Chain, objective: Objective, end: Particles) -> None:
        """Raise `InvalidInputError` where a terminal term, or u_0, has no gradient in the samples."""
        super().check(chain, objective, end)
        x = end.x.detach()[None].requires_grad_()
        condition = None if end.condition is None else {name: part[None] for name, part in end.condition.items()}
        with torch.enable_grad(), chain.evaluating():
            u = chain.transition(x, chain.trained_rows[:1] or [0], reference=True, held=True, condition=condition).u0
        if u is None or not u.requires_grad:
            raise InvalidInputError(
                "AdjointMatching differentiates the pretrained network in the states, and the chain's reference "
                "returns a result without a gradient, as after .detach() or torch.no_grad(); return it with its "
                "gradient, or use Adjoint"
            )

    def pull(self, chain: Chain, objective: Objective, at: RowStates, carry: Carry) -> Pulled:
        """λ̃_k from λ̃_{k+1}."""
        x, lean = at.x.detach().requires_grad_(), carry["adjoint"]
        with torch.enable_grad():
            transition = chain.transition(x, at.rows, reference=True, held=True, condition=at.condition)
            assert transition.u0 is not None
            cost, costs = running_costs(objective, replace(transition, u0=transition.u0.detach()))
            surrogate = (transition.b * lean * (transition.u + transition.u0)).sum() + cost  # ∇_θ by u, ∇_x by u_0
        loss_scaling.backward_through(chain.denoiser, surrogate, transition, x)
        assert x.grad is not None
        return Pulled({"adjoint": transition.a * lean + x.grad}, costs, transition.evaluations)

    def memory(self, chain: Chain, objective: Objective, noise: Noise) -> Footprint:
        """An adjoint per sample, and the activations of both networks on a single row."""
        row, recomputed = row_activations(chain, objective, noise, reference=True)
        end = end_activations(chain, objective, noise)
        return Footprint(carry=bytes_of(chain.event_shape, chain.dtype), turn=end, pull=row + recomputed)
