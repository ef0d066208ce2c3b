r"""A kernel for pairs (z′, z, ε): it moves the contrast z′, and now and then replaces the whole pair by a new one.

A new pair begins with z′ = z. Since z, which made y, is itself a draw from the posterior given y, an exact kernel has
z′ ~ p(·|y, ξ) from the first step on, and needs no burn-in for that. What takes time is independence of z: at age k,
with the kernel's Markov operator P on the posterior, the gradient is

    E ∇_ξ V = ∇EIG − E_y Cov_{z|y}(P^k φ, τ),      φ = ∂_y log p(y|z, ξ),      τ = ∂_ξ T(z, ε; ξ),

and ∇EIG = E_y Cov_{z|y}(φ, τ): a gradient that grows from zero to its value as the contrast forgets z. Pairs that are
replaced with probability r in every iteration have ages of a geometric law, and the bias of their mean gradient is
E_y Cov(A φ, τ), A = Σ_k r (1 − r)^k P^k: with a kernel that forgets at the rate ρ, at most a share r/(1 − (1 − r)ρ) of
E_y[σ(φ)σ(τ)].

Without replacement (r = 0) this bias dies out, and another stays: the design is the best one for the n outcomes that
were drawn at the start. It is of the order 1/n, as that of any average over a sample that is optimised over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.design.experiment import Experiment
from implicit_diffusion.errors import InvalidInputError, check_number, check_type
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.kernel import Info, Kernel, State, Step
from implicit_diffusion.showing import brief


class PosteriorKernel(Kernel):
    """Moves the contrasts of an experiment's pairs by another kernel, and replaces pairs at a rate.

    The pairs' law is not e^{−V}, whose normaliser differs from outcome to outcome: they have no weights.

    Args:
        kernel: what moves z′, e.g. `MALA(0.1)`; exact kernels keep z′ a draw from its posterior, while ξ stands still.
        experiment: whose pairs the particles are.
        renewal: r in [0, 1), the probability with which a pair is replaced in each iteration.

    Raises:
        InvalidInputError: not a kernel or an experiment; a renewal outside of [0, 1).
    """

    def __init__(self, kernel: Kernel, experiment: Experiment, renewal: float = 0.02) -> None:
        check_type("kernel", kernel, Kernel, "use MALA(0.1), for example")
        check_type("experiment", experiment, Experiment, "use GaussianExperiment, or a subclass of Experiment")
        if isinstance(kernel, PosteriorKernel):
            raise InvalidInputError("kernel must be a plain one, such as MALA(0.1), got a PosteriorKernel")
        self.renewal = check_number("renewal", renewal, 0.0, 1.0, closed=True)
        if self.renewal == 1:
            raise InvalidInputError(
                "renewal must lie in [0, 1): pairs that are always new have z′ = z, and no gradient"
            )
        super().__init__(kernel.step_size)
        self.kernel, self.experiment = kernel, experiment
        self.evaluations_per_step, self.target_acceptance = kernel.evaluations_per_step, kernel.target_acceptance

    def _words(self) -> Iterable[str]:
        return brief(self.kernel), f"renewal={self.renewal:g}"

    def reach(self, h: float) -> float:
        return self.kernel.reach(h)

    def start(self, x: Float[Tensor, "n pair"], generator: torch.Generator) -> State:
        """As the kernel starts; a momentum is that of z′ alone."""
        state = self.kernel.start(x, generator)
        return state if state.momentum is None else state._replace(momentum=self._of_contrast(state.momentum))

    def draws(self, generator: torch.Generator, count: int, x: Float[Tensor, "n pair"]) -> tuple[Tensor, ...]:
        """The kernel's own; then new pairs with shape (count, n, pair), and U(0, 1) with shape (count, n)."""
        n, own = len(x), self.kernel.draws(generator, count, x)
        own = tuple(self._of_contrast(part) if part.shape == (count, *x.shape) else part for part in own)
        if not self.renewal:
            return own
        seed = int(torch.randint(2**62, (), generator=generator, device=x.device))
        new = self.experiment.sample(count * n, Noise(seed)).to(x).view(count, *x.shape)
        return *own, new, torch.rand((count, n), generator=generator, device=x.device, dtype=x.dtype)

    def move(self, step: Step) -> tuple[State, Info]:
        """A step of z′ under V; then the replacement of pairs, where V = −log p(z) since z′ = z."""
        if not self.renewal:
            return self.kernel.move(step)
        *own, new, uniform = step.draws
        state, info = self.kernel.move(step._replace(draws=tuple(own)))
        replaced = uniform < self.renewal
        value = state.value
        if value is not None:
            with torch.no_grad():
                value = torch.where(replaced, self.experiment.prior(self.experiment.pairs(new).latent), value)
        return state._replace(x=torch.where(replaced[:, None], new, state.x), value=value), info

    def _of_contrast(self, numbers: Float[Tensor, "*count n pair"]) -> Float[Tensor, "*count n pair"]:
        """Zero for z and ε."""
        mask = torch.zeros_like(numbers[..., :1, :])
        mask[..., : math.prod(self.experiment.event_shape)] = 1
        return numbers * mask
