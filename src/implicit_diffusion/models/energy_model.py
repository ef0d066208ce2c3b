"""A trained energy-based model on disk: a potential in standardised coordinates, with its log Z.

    log p(x) = −V((x − shift)/scale) − log Z − Σ log scale

A folder holds `model.safetensors` (the network, shift, scale, particles, and where the data were dequantised their
lattice) and `model.json` (how to build the network, log Z and its standard error). Nothing in it is executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, NonFiniteError, check_path
from implicit_diffusion.files.atomic import make_folder, replacing
from implicit_diffusion.files.foreign import inside
from implicit_diffusion.files.reading import one_line, read_json
from implicit_diffusion.files.tensors import load_tensors, save_tensors
from implicit_diffusion.models.lattice import Lattice
from implicit_diffusion.models.parts import SLACK, bounded
from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials import Tilted, conv, mlp
from implicit_diffusion.processes import main_only
from implicit_diffusion.samplers import HMC, MALA, ULA, Underdamped
from implicit_diffusion.samplers.kernel import Kernel
from implicit_diffusion.samplers.simulation import simulate
from implicit_diffusion.showing import Shown, brief, with_error

FORMAT = "implicit-diffusion energy model"
WEIGHTS, DESCRIPTION_FILE = "model.safetensors", "model.json"
SPACING, OFFSET = "lattice.spacing", "lattice.offset"


@dataclass(frozen=True)
class Architecture:
    """How the potential of a model is built: a Gaussian energy and a network.

    Args:
        kind: of the network, "mlp" for vectors or "conv" for images.
        event_shape: of one datum.
        width: of the hidden layers, or the number of channels.
        depth: hidden layers of an mlp.
    """

    kind: Literal["mlp", "conv"]
    event_shape: tuple[int, ...]
    width: int
    depth: int = 3

    def build(self, noise: Noise) -> Tilted:
        """The potential before training: π_θ = N(0, I).

        Args:
            noise: of the network's weights.

        Raises:
            InvalidInputError: an unknown kind, or one that does not fit the event shape.
        """
        if self.kind == "conv":
            return Tilted(conv(self.event_shape, noise, width=self.width), self.event_shape)
        if self.kind != "mlp":
            raise InvalidInputError(f"potential must be mlp or conv, got {self.kind!r}")
        if len(self.event_shape) != 1:
            raise InvalidInputError(f"potential: mlp needs vectors, got events {self.event_shape}; use conv")
        return Tilted(mlp(self.event_shape[0], noise, width=self.width, depth=self.depth), self.event_shape)


@dataclass(frozen=True)
class Moves:
    """The sampler of a model.

    Args:
        sampler: name of its kernel.
        step_size: in standardised coordinates.
        leapfrogs: steps of hmc between two acceptances.
    """

    sampler: Literal["ula", "mala", "underdamped", "hmc"]
    step_size: float
    leapfrogs: int = 3

    def kernel(self) -> Kernel:
        """The kernel."""
        if self.sampler == "hmc":
            return HMC(self.step_size, self.leapfrogs)
        return {"ula": ULA, "mala": MALA, "underdamped": Underdamped}[self.sampler](self.step_size)


@dataclass(frozen=True, repr=False)
class EnergyModel(Shown):
    """A potential with the coordinates of its data.

    Args:
        architecture: of the potential.
        potential: V of standardised points.
        shift, scale: z = (x − shift)/scale, broadcastable to an event, in the precision that the data need.
        moves: the sampler that it was trained with.
        particles: standardised draws from (nearly) π_θ, with shape (n, *event): where sampling begins.
        log_z: log ∫ e^{−V}; None where it is not known, and no likelihood is.
        log_z_se: its standard error; zero where it was computed by quadrature.
        lattice: of the data, where the model is one of these with uniform noise between the values.
    """

    architecture: Architecture
    potential: Tilted
    shift: Tensor
    scale: Tensor
    moves: Moves
    particles: Tensor
    log_z: float | None = None
    log_z_se: float | None = None
    lattice: Lattice | None = None

    def _words(self) -> Iterator[str]:
        yield brief(self.potential)
        yield repr(self.moves)
        yield f"{len(self.particles)} particles"
        if self.log_z is not None:
            yield f"log_z={with_error(self.log_z, self.log_z_se or 0.0)}"
        if self.lattice is not None:
            yield "of dequantised data"

    def standardise(self, x: Float[Tensor, "n *event"]) -> Float[Tensor, "n *event"]:
        """The model's coordinates of data."""
        return ((x - self.shift) / self.scale).to(self.particles)

    @torch.no_grad()
    def log_density(self, x: Float[Tensor, "n *event"]) -> Float[Tensor, " n"]:
        """Log p(x) in nats, per unit of the data's volume, in double precision.

        Raises:
            InvalidInputError: data of another event shape, or so far out that their energy is not finite; or a model
                whose log Z is not known.
        """
        if self.log_z is None:
            raise InvalidInputError(
                "this model does not know its log Z: its training was interrupted, or diverged; resume the training, "
                "or set it with with_log_z"
            )
        event = self._event_of(x)
        z = self.standardise(x)
        energy = torch.cat([self.potential(part) for part in z.split(2**14)]).double()
        bad = (~energy.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise InvalidInputError(
                f"{len(bad)} of {len(x)} data have no finite log-likelihood, the first in row {bad[0]}: it lies "
                f"{z[bad[0]].abs().max():.3g} deviations from the mean of the training data; are its units the same?"
            )
        return -energy - self.log_z - self.scale.double().expand(event).log().sum()

    def log_likelihood(self, x: Float[Tensor, "n *event"], noise: Noise) -> Float[Tensor, " n"]:
        """Log p(x) in nats; of a model of dequantised data, one draw of a lower bound of log P(x).

        That is log p(x + noise) plus the log-volume of a cell of the lattice; its mean over draws is the bound.

        Raises:
            InvalidInputError: as `log_density`; data that are not on the lattice.
        """
        if self.lattice is None:
            return self.log_density(x)
        event = self._event_of(x)
        return self.log_density(self.lattice.dequantise(x, noise.generator(0))) + self.lattice.log_volume(event)

    def _event_of(self, x: Tensor) -> tuple[int, ...]:
        event = self.architecture.event_shape
        if x.shape[1:] != event:
            raise InvalidInputError(f"data have event shape {tuple(x.shape[1:])}, the model {event}; they must agree")
        return event

    def sample(self, n: int, noise: Noise, steps: int = 200) -> Float[Tensor, "n *event"]:
        """Draws: particles of the training, moved further by the model's own sampler, in the data's coordinates.

        Particles do not cross between far modes, so shares of modes are those of the training's particles. Draws of a
        model of dequantised data lie between the values that such data have; `lattice.quantise` rounds them down.

        Args:
            n: number of draws.
            noise: of the choice of particles and of the sampler.
            steps: of the sampler.

        Raises:
            NonFiniteError: the sampler ran away.
        """
        generator = noise.generator(0)
        chosen = torch.randint(len(self.particles), (n,), generator=generator)
        z = self.particles[chosen]
        for state, _ in simulate(self.moves.kernel(), self.potential, z, noise.stream(1), steps):
            z = state.x
        if not z.isfinite().all():
            raise NonFiniteError(f"the {self.moves.sampler} sampler ran away within {steps} steps; use fewer steps")
        return z * self.scale + self.shift

    def with_log_z(self, log_z: float, log_z_se: float) -> EnergyModel:
        """The same model with another log Z."""
        return replace(self, log_z=log_z, log_z_se=log_z_se)

    @main_only
    def save(self, folder: Path) -> None:
        """Write the two files, each in one step, the weights with their checksums."""
        make_folder(folder)
        tensors = {"shift": self.shift, "scale": self.scale, "particles": self.particles}
        if self.lattice is not None:
            tensors |= {SPACING: self.lattice.spacing, OFFSET: self.lattice.offset}
        tensors |= {f"potential.{name}": value for name, value in self.potential.state_dict().items()}
        save_tensors(folder / WEIGHTS, {k: value.detach().cpu().contiguous() for k, value in tensors.items()}, {})
        described = {
            "format": FORMAT,
            "architecture": vars(self.architecture) | {"event_shape": list(self.architecture.event_shape)},
            "moves": vars(self.moves),
        } | {"log_z": self.log_z, "log_z_se": self.log_z_se}
        with replacing(folder / DESCRIPTION_FILE) as file:
            file.write_text(json.dumps(described, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def is_energy_model(folder: str | PathLike[str]) -> bool:
    """Whether a folder holds an energy-based model."""
    return (Path(folder).expanduser() / DESCRIPTION_FILE).is_file()


def load_energy_model(model: str | PathLike[str]) -> EnergyModel:
    """Read what `EnergyModel.save` wrote.

    Args:
        model: the folder.

    Raises:
        InvalidInputError: no such folder, or files that are damaged or do not hold an energy-based model. Weights that
            an earlier release wrote have no checksums, and are used as they are.
    """
    folder = check_path("model", model)
    if not is_energy_model(folder):
        raise InvalidInputError(
            f"model: {folder} holds no {DESCRIPTION_FILE}; give the model/ folder of an `implicit-diffusion ebm` run"
        )
    try:
        energy_model = _read(folder)
        _check(energy_model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as cause:
        raise InvalidInputError(
            f"model: {folder} is damaged, or not an energy-based model: {one_line(cause)}"
        ) from cause
    energy_model.potential.eval().requires_grad_(False)
    return energy_model


def _read(folder: Path) -> EnergyModel:
    """The model in a folder; where there is none, it raises errors of many kinds."""
    description = read_json(inside(folder, folder / DESCRIPTION_FILE))
    if description.get("format") != FORMAT:
        raise ValueError(f"its format is {description.get('format')!r}")
    built = description["architecture"]
    architecture = Architecture(**built | {"event_shape": tuple(built["event_shape"])})
    tensors, _ = load_tensors(inside(folder, folder / WEIGHTS))
    if wrong := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"{', '.join(wrong)} must be finite")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    with bounded(2 * numbers + SLACK, 4 * len(tensors) + 100):
        potential = architecture.build(Noise(0)).to(tensors["particles"].dtype)
    weights = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith("potential.")}
    potential.load_state_dict(weights)
    return EnergyModel(
        architecture=architecture,
        potential=potential,
        shift=tensors["shift"],
        scale=tensors["scale"],
        moves=Moves(**description["moves"]),
        particles=tensors["particles"],
        log_z=description["log_z"],
        log_z_se=description["log_z_se"],
        lattice=Lattice(tensors[SPACING], tensors[OFFSET]) if SPACING in tensors else None,
    )


def _check(model: EnergyModel) -> None:
    """Raise an error about parts that do not fit each other, or that no training could have made."""
    model.moves.kernel()
    event, lattice = model.architecture.event_shape, model.lattice
    shapes = model.shift.shape, model.scale.shape, event
    if model.particles.shape[1:] != event or torch.broadcast_shapes(*shapes) != event:
        raise ValueError(f"particles, shift and scale do not have the event shape {event}")
    if not (model.scale > 0).all():
        raise ValueError("scale must be finite and positive")
    if lattice is not None:
        if torch.broadcast_shapes(lattice.spacing.shape, lattice.offset.shape, event) != event:
            raise ValueError(f"its lattice does not have the event shape {event}")
        if not (lattice.spacing >= 0).all():
            raise ValueError("the spacing of its lattice must not be negative")
    for name, number in (("log_z", model.log_z), ("log_z_se", model.log_z_se)):
        if number is not None and not (isinstance(number, int | float) and math.isfinite(number)):
            raise ValueError(f"{name} must be finite, got {number}")
