"""What `implicit-diffusion ebm` is asked, with defaults that depend on the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from implicit_diffusion.commands.ebm.arms import Settings
from implicit_diffusion.commands.ebm.data import Data
from implicit_diffusion.commands.shared.planar import LAWS
from implicit_diffusion.commands.shared.ranges import at_least, not_negative, option, positive
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.energy_model import Architecture, Moves

DEFAULTS: dict[str, dict[str, Any]] = {
    "vectors": {
        "potential": "mlp",
        "steps": 1000,
        "particles": 1000,
        "step_size": 0.06,
        "leapfrogs": 4,
        "refresh": 250,
        "lr": 3e-3,
        "weight_decay": 0.0,
        "width": 64,
        "judge_steps": 200,
    },
    "images": {
        "potential": "conv",
        "steps": 1200,
        "particles": 256,
        "step_size": 0.2,
        "leapfrogs": 4,
        "refresh": 100,
        "lr": 1e-3,
        "weight_decay": 0.01,
        "width": 16,
        "judge_steps": 1500,  # their weights are heavier: few steps find log Z too low
    },
}


@dataclass(frozen=True)
class Config:
    """Train an energy-based model by maximum likelihood in a single loop."""

    data: str = "moons"
    """"moons", "circles", "checkerboard", "eight-gaussians" (masses 1:2:…:8), "two-spirals", "digits", or FILE.
    A file may be FILE.npy, FILE.npz, FILE.npz:NAME for one of several arrays, FILE.csv, or FILE.safetensors.
    Its array has shape (m, d) or (m, channels, height, width)."""
    dequantise: bool = False
    """Fill the gaps between the values of integers, grey levels, or rounded measurements with uniform noise.
    Likelihoods are then lower bounds of the probabilities of the values; without, they may grow without limit."""
    potential: Literal["mlp", "conv"] | None = None
    """The network beside the Gaussian; by default mlp for vectors, conv for images."""
    sampler: Literal["ula", "mala", "underdamped", "hmc"] = "hmc"
    """The kernel that moves the particles, once per update."""
    weighted: bool = True
    """Weigh the particles for the motion of the parameters θ, for the right masses of modes, and log Z.
    Underdamped has no weights."""
    steps: int | None = None
    """Number of updates of the parameters θ; 1000 for vectors, 1200 for images by default."""
    particles: int | None = None
    """Number of particles, and of data per update; 1000 for vectors, 256 for images by default.
    Weighted, it must be a multiple of 8."""
    step_size: float | None = None
    """Step size h of the sampler in standardised coordinates; by default 0.06 for vectors, 0.2 for images.
    Ula and mala take the square of that default."""
    adapt_step: bool = False
    """Move the step size while training, for the share of accepted proposals that suits mala (0.574) or hmc (0.8)."""
    leapfrogs: int | None = None
    """Number of leapfrog steps of hmc; 4 by default.
    Together with the step size they should carry a particle through its mode."""
    refresh: int | None = None
    """Number of updates after which weighted particles are drawn anew; 0 means never.
    The default is 250 for vectors, 100 for images.
    That ends the errors that their weights have accumulated."""
    lr: float | None = None
    """Learning rate of Adam at the start, which decays to zero along a cosine.
    The default is 3e-3 for vectors, 1e-3 for images."""
    weight_decay: float | None = None
    """Weight decay of AdamW; it holds a network down that out-grows the Gaussian.
    The default is 0 for vectors, 0.01 for images."""
    width: int | None = None
    """Width of the network; 64 for mlp (three hidden layers), 16 channels for conv by default."""
    judge_steps: int | None = None
    """Number of annealing steps that estimate the final log Z; 200 for vectors, 1500 for images by default.
    Half as many again check it; for images they are most of the time after training."""
    long_chains: bool = False
    """For images: also move particles ten times as long as training did, to see whether they drift off."""
    compare: bool = False
    """Compare all ways of training at equal cost instead; for data of the plane with a known law only."""
    seeds: int | None = None
    """Number of seeds of the comparison; 5 by default."""
    seed: int = 0
    """Seed of all random numbers: the same seed gives the same model, bit for bit."""
    out: Path | None = None
    """Folder for the run, new or empty, by default runs/ebm-<data>-<time>.
    An interrupted comparison goes on in its own."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range, or an option has no effect."""
        at_least(self, steps=1, particles=16, leapfrogs=1, width=1, judge_steps=2, seeds=1, seed=0, refresh=0)
        if self.weighted and self.particles is not None and self.particles % 8:
            raise InvalidInputError(f"--particles must be a multiple of 8, got {self.particles}")
        positive(self, "step_size", "lr")
        not_negative(self, "weight_decay")
        for name, why in self._idle().items():
            if getattr(self, name) != getattr(Config, name):
                raise InvalidInputError(f"{option(name, getattr(self, name))} has no effect: {why}; leave it out")
        if self.sampler == "underdamped" and (self.weighted or self.compare):
            other = "" if self.compare else ", or add --no-weighted"
            raise InvalidInputError(f"--sampler underdamped knows no weights; take ula, mala or hmc{other}")

    def resolved(self, data: Data) -> Config:
        """With the defaults for these data in place of None, where the option has an effect."""
        idle = self._idle()
        return replace(self, **{name: value for name, value in self._values(data).items() if name not in idle})

    def settings(self, data: Data) -> Settings:
        """What to train on these data."""
        values = self._values(data)
        return Settings(
            Architecture(values["potential"], data.event_shape, values["width"]),
            Moves(self.sampler, values["step_size"], values["leapfrogs"]),
            "weighted" if self.weighted else "hmc",
            values["particles"],
            values["steps"],
            values["lr"],
            self.seed,
            weight_decay=values["weight_decay"],
            refresh=values["refresh"] if self.weighted else 0,
            adapt=self.adapt_step,
        )

    def _values(self, data: Data) -> dict[str, Any]:
        """All options that have defaults, with these in place of None."""
        defaults = DEFAULTS["images" if len(data.event_shape) == 3 else "vectors"] | {"seeds": 5}
        if self.sampler in ("ula", "mala"):
            defaults |= {"step_size": defaults["step_size"] ** 2}
        return {name: value if getattr(self, name) is None else getattr(self, name) for name, value in defaults.items()}

    def _idle(self) -> dict[str, str]:
        """Options without an effect beside the others, and why."""
        idle: dict[str, str] = {}
        if self.data in (*LAWS, "digits"):
            why = "are dequantised in any case" if self.data == "digits" else "has a density"
            idle |= {"dequantise": f"--data {self.data} {why}"}
        if self.sampler != "hmc":
            idle |= {"leapfrogs": f"--sampler {self.sampler} has none"}
        if self.sampler in ("ula", "underdamped"):
            idle |= {"adapt_step": f"--sampler {self.sampler} accepts everything"}
        if not self.compare:
            idle |= {"seeds": "it is the number of runs of --compare"}
            return idle if self.weighted else idle | {"refresh": "particles without weights are not drawn anew"}
        return idle | {
            "lr": "--compare searches the rate of every arm",
            "adapt_step": "--compare holds the step size fixed",
            "refresh": "--compare never draws particles anew",
            "weighted": "--compare runs arms with weights and without",
            "long_chains": "--compare takes laws of the plane",
        }


def markdown() -> str:
    """`DEFAULTS` as the table of the documentation."""
    lines = ["| option | vectors | images |", "|---|---|---|"]
    for name, value in DEFAULTS["vectors"].items():
        lines.append(f"| `{option(name)}` | {value} | {DEFAULTS['images'][name]} |")
    return "\n".join(lines)
