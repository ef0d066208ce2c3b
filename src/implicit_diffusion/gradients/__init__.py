"""Gradient estimators Γ of θ ↦ F(π*(θ)); they add to the parameters' `.grad`."""

from implicit_diffusion.gradients.adjoint import Adjoint, pull_back, terminal_adjoint
from implicit_diffusion.gradients.backprop import FullBackprop

__all__ = ["Adjoint", "FullBackprop", "pull_back", "terminal_adjoint"]
