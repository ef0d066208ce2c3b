"""Gradient estimators Γ of θ ↦ F(π*(θ))."""

from implicit_diffusion.gradients.adjoint import Adjoint, pull_back, terminal_adjoint
from implicit_diffusion.gradients.backprop import FullBackprop
from implicit_diffusion.gradients.gibbs import Fused, fused_pass

__all__ = ["Adjoint", "FullBackprop", "Fused", "fused_pass", "pull_back", "terminal_adjoint"]
