r"""A kernel for pairs (z′, z, ε): it moves z′, exchanges it with z, and now and then replaces the pair by a new one.

A new pair begins with z′ = z. Since z, which made y, is itself a draw from the posterior given y, an exact kernel has
z′ ~ p(·|y, ξ) from the first step on, and needs no burn-in for that. What takes time is independence of z: at age k,
with the kernel's Markov operator P on the posterior, the gradient is

    E ∇_ξ V = ∇EIG − E_y Cov_{z|y}(P^k φ, τ),      φ = ∂_y log p(y|z, ξ),      τ = ∂_ξ T(z, ε; ξ),

and ∇EIG = E_y Cov_{z|y}(φ, τ): a gradient that grows from zero to its value as the contrast forgets z. Pairs that are
replaced with probability r in every iteration have ages of a geometric law, and the bias of their mean gradient is
E_y Cov(A φ, τ), A = Σ_k r (1 − r)^k P^k: with a kernel that forgets at the rate ρ, at most a share r/(1 − (1 − r)ρ) of
E_y[σ(φ)σ(τ)]. What is gained by waiting is paid in noise: the gradients of a pair's life are those of one outcome, and
in the course of a run they average like r n independent ones per iteration, not n.

**Exchange.** Given y, z and z′ have one law, and so have (z′, z) and (z, z′). Where y = T(z, ε; ξ) can be solved for ε,
a pair becomes (z, z′, ε′) with T(z′, ε′; ξ) = y in every iteration: the law of pairs stays, as does E ∇_ξ V for a
reversible P, since ⟨P^i φ, P^{k−i} τ⟩ = ⟨P^k φ, τ⟩. Its noise shrinks: both roles of the two latents are averaged
over, and with them what ∇_ξ V owes to ε.

Without replacement (r = 0) the bias dies out, and another stays: the design is the best one for the n outcomes that
were drawn at the start. It is of the order 1/n, as that of any average over a sample that is optimised over. Nothing is
exchanged then: while ξ moves, the lag of contrasts would enter the outcomes, and no replacement would end it.

**Pools** (`pool`). A sample z′_j moves under the mean potential of its pool's outcomes, of which each is replaced with
probability r, up to r = 1. Where they are several, the samples stay: they draw near the new pooled posterior as they
go on, and are not exact draws from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.design.experiment import TRIED, Experiment
from implicit_diffusion.design.pool import PAIR, Pool
from implicit_diffusion.errors import InvalidInputError, check_number, check_type, shown, trying
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.kernel import Info, Kernel, State, Step
from implicit_diffusion.showing import brief


class PosteriorKernel(Kernel):
    """Moves the contrasts of an experiment's pairs by another kernel, exchanges roles, and replaces pairs at a rate.

    The pairs' law is not e^{−V}, whose normaliser differs from outcome to outcome: they have no weights.

    Args:
        kernel: what moves z′, e.g. `MALA(0.1)`; exact kernels keep z′ a draw from its posterior, while ξ stands still.
        experiment: whose pairs the particles are.
        renewal: r in [0, 1), the probability with which a pair is replaced in each iteration; in pools of several
            outcomes that of an outcome, up to 1.
        pool: how many outcomes share samples, and how many; of one each by default, pairs.

    Raises:
        InvalidInputError: not a kernel, an experiment or a pool; a renewal outside of [0, 1); an experiment whose
            `noise_of` does not invert its `outcome`.
    """

    def __init__(self, kernel: Kernel, experiment: Experiment, renewal: float = 0.1, pool: Pool = PAIR) -> None:
        check_type("kernel", kernel, Kernel, "use MALA(0.1), for example")
        check_type("experiment", experiment, Experiment, "use GaussianExperiment, or a subclass of Experiment")
        check_type("pool", pool, Pool, "use Pool(outcomes, samples), or leave it out")
        if isinstance(kernel, PosteriorKernel):
            raise InvalidInputError("kernel must be a plain one, such as MALA(0.1), got a PosteriorKernel")
        self.renewal = check_number("renewal", renewal, 0.0, 1.0, closed=True)
        if self.renewal == 1 and pool.outcomes == 1:
            raise InvalidInputError(
                "renewal must lie in [0, 1): pairs that are always new have z′ = z, and no gradient"
            )
        super().__init__(kernel.step_size)
        self.kernel, self.experiment, self.pool = kernel, experiment, pool
        self.evaluations_per_step, self.target_acceptance = kernel.evaluations_per_step, kernel.target_acceptance
        self.exchanges = self.renewal > 0 and pool.size == 1 and solvable(experiment)

    def _words(self) -> Iterable[str]:
        yield from (brief(self.kernel), f"renewal={self.renewal:g}")
        if self.pool.size > 1:
            yield f"pool={self.pool.outcomes} × {self.pool.samples}"

    def reach(self, h: float) -> float:
        return self.kernel.reach(h)

    def start(self, x: Float[Tensor, "n pair"], generator: torch.Generator) -> State:
        """As the kernel starts; a momentum is that of z′ alone. Pairs that are not pools yet are made into pools.

        The first pairs of the rows become the outcomes, those of the first row the samples; where they have not moved,
        they begin at the latents of the outcomes in turn.
        """
        state = self.kernel.start(self._as_pools(x), generator)
        if state.momentum is None:
            return state
        return state._replace(momentum=self.pool.of_samples(self._of_contrast(state.momentum)))

    def draws(self, generator: torch.Generator, count: int, x: Float[Tensor, "n pair"]) -> tuple[Tensor, ...]:
        """The kernel's own; then new pairs with shape (count, n, pair), and U(0, 1) with shape (count, n)."""
        n, own = len(x), self.kernel.draws(generator, count, x)
        own = tuple(self._of_contrast(part) if part.shape == (count, *x.shape) else part for part in own)
        own = tuple(self.pool.of_samples(part, 1) if part.shape[:2] == (count, n) else part for part in own)
        if not self.renewal:
            return own
        seed = int(torch.randint(2**62, (), generator=generator, device=x.device))
        new = self.experiment.sample(count * n, Noise(seed)).to(x).view(count, *x.shape)
        uniform = torch.rand((count, n), generator=generator, device=x.device, dtype=x.dtype)
        return *own, self.pool.of_outcomes(new, 1), self.pool.of_outcomes(uniform, 1)

    def move(self, step: Step) -> tuple[State, Info]:
        """A step of z′ under V, in pools under its mean; the exchange; then the replacement of pairs or of outcomes.

        The value that the state has is the kernel's, except for new pairs, where V = −log p(z) since z′ = z.
        """
        own, renewing = (step.draws[:-2], step.draws[-2:]) if self.renewal else (step.draws, ())
        here, energy = self.pool.pooled(step.here), lambda y: self.pool.pooled(step.energy(y))
        state, info = self.kernel.move(step._replace(here=here, energy=energy, draws=own))
        if not renewing:
            return state, info
        new, uniform = renewing
        if self.exchanges:
            state = self._exchanged(state)
        replaced, value = uniform < self.renewal, state.value
        if self.pool.outcomes > 1:
            d = math.prod(self.experiment.event_shape)
            new = torch.cat([state.x[:, :d], new[:, d:]], 1)
        elif value is not None:
            with torch.no_grad():
                value = torch.where(replaced, self.experiment.prior(self.experiment.pairs(new).latent), value)
        return state._replace(x=torch.where(replaced[:, None], new, state.x), value=value), info

    @torch.no_grad()
    def _exchanged(self, state: State) -> State:
        """(z, z′, ε′), with T(z′, ε′; ξ) = T(z, ε; ξ)."""
        contrast, latent, noise = self.experiment.pairs(state.x)
        other = self.experiment.noise_of(self.experiment.outcome(latent, noise), contrast)
        assert other is not None
        value = state.value
        if value is not None:  # V(z′; z, ε) + log p(z′) = −(V(z; z′, ε′) + log p(z))
            value = self.experiment.prior(torch.cat([latent, contrast])).view(2, -1).sum(0) - value
        return state._replace(x=self.experiment.joined(latent, contrast, other), value=value)

    def _as_pools(self, x: Float[Tensor, "n pair"]) -> Float[Tensor, "n pair"]:
        """The same pairs as a grid of outcomes and samples."""
        pool, d = self.pool, math.prod(self.experiment.event_shape)
        if pool.size == 1:
            return x
        outcomes, given = pool.of_outcomes(x), pool.of_samples(x)
        latents = pool.grid(outcomes)[:, torch.arange(pool.samples) % pool.outcomes, 0, d : 2 * d]
        latents = latents[:, None].expand(-1, pool.outcomes, -1, -1).flatten(0, 2)
        unmoved = (given[:, :d] == given[:, d : 2 * d]).all(1, keepdim=True)
        return torch.cat([torch.where(unmoved, latents, given[:, :d]), outcomes[:, d:]], 1)

    def _of_contrast(self, numbers: Float[Tensor, "*count n pair"]) -> Float[Tensor, "*count n pair"]:
        """Zero for z and ε."""
        mask = torch.zeros_like(numbers[..., :1, :])
        mask[..., : math.prod(self.experiment.event_shape)] = 1
        return numbers * mask


@torch.no_grad()
def solvable(experiment: Experiment) -> bool:
    """Whether the experiment knows the noise behind an outcome.

    Raises:
        InvalidInputError: it is not the noise that made the outcome.
    """
    z, noise = experiment.draw(TRIED, Noise(0))
    with eval_mode(experiment), trying("experiment.noise_of", f"{TRIED} outcomes and their latents"):
        solved = experiment.noise_of(experiment.outcome(z, noise), z)
    if solved is None:
        return False
    fits = isinstance(solved, Tensor) and solved.shape == noise.shape and solved.dtype == noise.dtype
    if not fits or not torch.allclose(solved, noise, rtol=1e-2, atol=1e-2):
        raise InvalidInputError(
            f"experiment.noise_of must solve y = outcome(z, noise) for the noise, shape {tuple(noise.shape)}, got "
            f"{shown(solved)}; return None where it has no single solution"
        )
    return True
