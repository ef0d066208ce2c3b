"""The two KL divergences between a stationary law π_θ ∝ e^{−V} and another one.

    KL(p_ref‖p) = ∫ p_ref log(p_ref/p)                F′ = −p_ref/p, the measure F′·p is −p_ref: −1/m on each datum
    KL(p‖e^{−U}/Z) = ∫ p (log p + U) + log Z          F′ = log p + U + 1, which at p = π_θ is U − V up to a constant

The entropy of p_ref and the normaliser of e^{−U} are constants, and drop out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError, check_call, check_integer, check_number
from implicit_diffusion.frozen import frozen_copy, modules_in
from implicit_diffusion.objectives.attributes import changed, check_name
from implicit_diffusion.objectives.base import GibbsObjective
from implicit_diffusion.objectives.data import check_fits, checked
from implicit_diffusion.objectives.variation import Density, FirstVariation
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials.energy import known_log_z, precision, value_of
from implicit_diffusion.rounding import at_least_single, exact


class ForwardKL(GibbsObjective):
    """KL(p_ref‖π_θ): maximum likelihood of an energy-based model.

    Its value is the cross-entropy E_ref[V] + log Z in nats, i.e. the KL plus the entropy of the data, and is reported
    where weighted particles know log Z; it is unknown elsewhere.

    Args:
        data: draws from p_ref, with shape (m, *event).
        batch: data per estimate, drawn with replacement; all of them where None.
        name: under which metrics report it.

    Raises:
        InvalidInputError: no data, data that are NaN or infinite, or a batch below one; in `first_variation`, a
            density without points.
    """

    support = "points"
    separable = True

    def __init__(self, data: Float[Tensor, "m *event"], batch: int | None = None, name: str = "nll") -> None:
        self.data = checked(data)
        self.batch = None if batch is None else check_integer("batch", batch, note=", or None for all data")
        self.name = check_name(name)

    def draw(self, generator: torch.Generator) -> Float[Tensor, "m *event"]:
        if self.batch is None:
            return self.data
        index = torch.randint(len(self.data), (self.batch,), generator=generator, device=self.data.device)
        return self.data[index]

    def first_variation(self, particles: Particles, density: Density) -> FirstVariation:
        points, log_z, value = density.points, particles.log_z, None
        if points is None:
            raise InvalidInputError(f"{self.name} needs the data that its draw returned: Density(energy, points)")
        if log_z is not None and density.energy_at_points is not None:
            value = processes.mean(density.energy_at_points.to(log_z).mean()) + log_z
        m = len(points)
        charges = points.new_full((m,), -1 / (m * processes.count()))  # those of other processes, or by 1/W in each
        return FirstVariation(on_points=charges, total_on_points=-1.0, value=value)

    def check_stationary(self, particles: Particles, energy: Float[Tensor, " n"]) -> None:
        """Raise `InvalidInputError` for data of another event shape, dtype or device than the particles."""
        check_fits("ForwardKL", self.data, particles.x)


class ReverseKL(GibbsObjective):
    """KL(π_θ‖e^{−U}/Z), in nats.

    With U a frozen copy of the initial potential it is the KL to the initial model, `ReverseKL.to_initial(potential)`.
    The value is E_p[U − V] + log Z_U − log Z_V. Weighted particles know the difference of the last two where both are
    known, or where U is the potential that their loop started with. Elsewhere it is estimated by log E_p e^{V − U}:
    consistent, but far too low once the particles have left the bulk of e^{−U}.

    Args:
        potential: U, (n, *event) → (n,).
        name: under which metrics report it.
        log_z: log Z_U, where it is known.

    Raises:
        InvalidInputError: a potential that is not a function of one argument; a log Z_U that is not a finite number.
    """

    separable = True

    def __init__(
        self, potential: Callable[[Tensor], Tensor], name: str = "reverse_kl", log_z: float | None = None
    ) -> None:
        check_call("potential", potential, "x")
        self.potential, self.name = potential, check_name(name)
        self.log_z = None if log_z is None else check_number("log_z", log_z, note=", or None where it is not known")
        self.is_start = False  # whether U is the potential that the loop started with: see `starting_at`

    @classmethod
    def to_initial(cls, potential: nn.Module, name: str = "kl_to_initial") -> ReverseKL:
        """KL to the law of `potential` as it is now."""
        return cls(frozen_copy(potential), name, known_log_z(potential))

    def networks(self) -> Iterable[nn.Module]:
        return modules_in(self.potential)

    def first_variation(self, particles: Particles, density: Density) -> FirstVariation:
        energy = density.energy
        with torch.no_grad():
            excess = exact(energy) - exact(value_of(self.potential, particles.x))
            log_weights = None if particles.log_weights is None else exact(particles.log_weights)
            if self.log_z is not None and particles.log_z is not None:
                log_ratio = self.log_z - particles.log_z
            elif self.is_start and particles.log_z_growth is not None:
                log_ratio = -particles.log_z_growth
            elif log_weights is None:
                everywhere = processes.gathered(excess)
                log_ratio = everywhere.logsumexp(0) - math.log(len(everywhere))
            else:
                log_ratio = (log_weights + processes.gathered(excess)).logsumexp(0) - log_weights.logsumexp(0)
            mean = Particles(particles.x, log_weights).mean(excess)
            return FirstVariation(-excess, value=(log_ratio - mean).to(energy.dtype))

    def check_stationary(self, particles: Particles, energy: Float[Tensor, " n"]) -> None:
        """Raise `InvalidInputError` for a potential U of the wrong shape or dtype, or not finite on the particles."""
        x = particles.x
        first = next(self.potential.parameters(), x) if isinstance(self.potential, nn.Module) else x
        if (at_least_single(first.dtype), first.device) != (x.dtype, x.device):
            raise InvalidInputError(
                f"ReverseKL: its potential is {first.dtype} on {first.device}, particles {x.dtype} on {x.device}; use "
                "potential.to(x)"
            )
        with torch.no_grad():
            reference = self.potential(x.to(precision(self.potential, x)))
        fits = isinstance(reference, Tensor) and reference.shape == energy.shape
        fits = fits and at_least_single(reference.dtype) == energy.dtype and reference.is_floating_point()
        if not fits or not reference.isfinite().all():
            form = f"{reference.dtype}, {tuple(reference.shape)}" if isinstance(reference, Tensor) else None
            raise InvalidInputError(
                f"ReverseKL: its potential must return finite numbers of {energy.dtype}, {tuple(energy.shape)} on the "
                f"particles, got {form or type(reference).__name__}"
            )

    def starting_at(self, particles: Particles, energy: Float[Tensor, " n"]) -> ReverseKL:
        """A copy that reads log Z_U − log Z_V off the growth of log Z, where U is the potential that the loop starts
        with.
        """
        with torch.no_grad():
            at_start = value_of(self.potential, particles.x.clone())
        is_start = torch.equal(at_start, energy)
        return self if is_start == self.is_start else changed(self, is_start=is_start)
