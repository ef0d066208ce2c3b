"""The options of `ebm`, with defaults that depend on the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from implicit_diffusion.commands.ebm.arms import ScoreStart, Settings
from implicit_diffusion.commands.ebm.data import Data
from implicit_diffusion.commands.shared.ranges import at_least, not_negative, option, positive
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.checkpoints import KEEP
from implicit_diffusion.models.energy_model import Architecture, Moves
from implicit_diffusion.potentials.plane import LAWS
from implicit_diffusion.runs.trackers.opening import TrackerName


@dataclass(frozen=True)
class Defaults:
    """Options whose defaults depend on the data."""

    potential: Literal["mlp", "conv"]
    steps: int
    particles: int
    step_size: float
    leapfrogs: int
    refresh: int
    lr: float
    weight_decay: float
    width: int
    judge_steps: int
    start_steps: int
    start_noise: float
    seeds: int = 5


VECTORS = Defaults(
    potential="mlp",
    steps=1000,
    particles=1000,
    step_size=0.06,
    leapfrogs=4,
    refresh=250,
    lr=3e-3,
    weight_decay=0.0,
    width=64,
    judge_steps=200,
    start_steps=500,
    start_noise=0.1,
)
IMAGES = Defaults(
    potential="conv",
    steps=1200,
    particles=256,
    step_size=0.2,
    leapfrogs=4,
    refresh=100,
    lr=1e-3,
    weight_decay=0.01,
    width=16,
    judge_steps=1500,  # their weights are heavier: few steps give a log Z that is too low
    start_steps=300,
    start_noise=0.3,
)


@dataclass(frozen=True)
class Config:
    """Train an energy-based model by maximum likelihood, in a single loop of sampling and optimisation."""

    data: str = "moons"
    """"moons", "circles", "checkerboard", "eight-gaussians" (masses 1:2:…:8), "two-spirals", images, or FILE.
    Images are "digits", or "fashion-mnist" where Debian's package dataset-fashion-mnist is installed.
    A file may be FILE.npy, FILE.npz:NAME, FILE.csv, FILE.safetensors, or an IDX file such as FILE-idx3-ubyte.gz.
    Its array has shape (m, d) or (m, channels, height, width)."""
    dequantise: bool = False
    """Add uniform noise to integers, grey levels or rounded measurements, to fill the gaps between their values.
    Likelihoods are then lower bounds of the probabilities of these values; without the noise they can grow forever."""
    potential: Literal["mlp", "conv"] | None = None
    """Kind of network that is added to a Gaussian energy; by default mlp for vectors, conv for images."""
    sampler: Literal["ula", "mala", "underdamped", "hmc"] = "hmc"
    """Markov kernel that moves the particles, once per update."""
    weighted: bool = True
    """Weight the particles to correct for the changes of the parameters θ, so that modes get the right masses.
    The weights estimate log Z too. The sampler underdamped does not support them."""
    steps: int | None = None
    """Number of updates of the parameters θ; 1000 for vectors, 1200 for images by default."""
    particles: int | None = None
    """Number of particles, and of data points per update; 1000 for vectors, 256 for images by default.
    With weights it must be a multiple of 8."""
    step_size: float | None = None
    """Step size h of the sampler, for data scaled to unit variance; by default 0.06 for vectors, 0.2 for images.
    For ula and mala the default is the square of that."""
    adapt_step: bool = False
    """Adapt the step size during training to the best share of accepted proposals: 0.574 for mala, 0.8 for hmc."""
    leapfrogs: int | None = None
    """Number of leapfrog steps of hmc; 4 by default.
    Choose it with --step-size, such that all steps together move a particle across a mode."""
    refresh: int | None = None
    """Number of updates after which weighted particles are drawn afresh, without the errors of their weights so far.
    The default is 250 for vectors, 100 for images; 0 means never."""
    lr: float | None = None
    """Learning rate of Adam at the start; it decays to zero along a cosine.
    The default is 3e-3 for vectors, 1e-3 for images."""
    weight_decay: float | None = None
    """Weight decay of AdamW; it keeps the network from outgrowing the Gaussian far away from the data.
    The default is 0 for vectors, 0.01 for images."""
    width: int | None = None
    """Width of the network; by default 64 units for mlp, which has three hidden layers, and 16 channels for conv."""
    start_by: Literal["gaussian", "score-matching"] = "gaussian"
    """What the model is before particles train it: a Gaussian, or what score matching learns without any particles.
    Particles are then drawn from that, weighted, by annealing; the seconds of both count."""
    start_steps: int | None = None
    """Number of updates of score matching; 500 for vectors, 300 for images by default."""
    start_noise: float | None = None
    """Standard deviation of the noise that score matching adds to the data, which are scaled to unit variance.
    Choose it below the narrowest width that matters; the default is 0.1 for vectors, 0.3 for images."""
    judge_steps: int | None = None
    """Number of annealing steps to estimate the final log Z; 200 for vectors, 1500 for images by default.
    A second estimate with half as many steps checks the first. For images this takes long."""
    long_chains: bool = False
    """Also move the particles of images ten times as long as training did, to see whether they drift away."""
    compare: bool = False
    """Compare all ways of training at equal cost instead; only for data in the plane whose distribution is known."""
    seeds: int | None = None
    """Number of runs of each way of training in a comparison; 5 by default."""
    seed: int = 0
    """Seed of all random numbers: the same seed gives the same model, bit for bit."""
    keep: int = KEEP
    """Number of checkpoints to keep: should the newest be damaged, an older one continues the run."""
    out: Path | None = None
    """Folder for the run, new or empty; by default runs/ebm-<data>-<time>.
    The folder of an interrupted comparison may be given again, to continue it."""
    track: tuple[TrackerName, ...] = ()
    """Where else to show the numbers and pictures of the training.
    "tensorboard" writes event files into the folder of the run; "wandb" sends them to Weights & Biases."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range, or an option has no effect."""
        at_least(self, steps=1, particles=16, leapfrogs=1, width=1, judge_steps=2, seeds=1, seed=0, refresh=0, keep=1)
        at_least(self, start_steps=1)
        if self.weighted and self.particles is not None and self.particles % 8:
            raise InvalidInputError(f"--particles must be a multiple of 8, got {self.particles}")
        positive(self, "step_size", "lr", "start_noise")
        not_negative(self, "weight_decay")
        for name, why in self._idle().items():
            if getattr(self, name) != getattr(Config, name):
                raise InvalidInputError(f"{option(name, getattr(self, name))} has no effect: {why}; leave it out")
        if self.start_by == "score-matching" and not self.weighted:
            raise InvalidInputError(
                "--start-by score-matching needs weighted particles, which take over from it; leave out --no-weighted"
            )
        if self.sampler == "underdamped" and (self.weighted or self.compare):
            other = "" if self.compare else ", or add --no-weighted"
            raise InvalidInputError(f"--sampler underdamped does not support weights; use ula, mala or hmc{other}")

    def resolved(self, data: Data) -> Config:
        """With the defaults for these data in place of None, where the option has an effect."""
        idle, values = self._idle(), asdict(self._values(data))
        return replace(self, **{name: value for name, value in values.items() if name not in idle})

    def settings(self, data: Data) -> Settings:
        """What to train on these data."""
        values = self._values(data)
        return Settings(
            architecture=Architecture(values.potential, data.event_shape, values.width),
            moves=Moves(self.sampler, values.step_size, values.leapfrogs),
            arm="weighted" if self.weighted else "hmc",
            particles=values.particles,
            updates=values.steps,
            lr=values.lr,
            seed=self.seed,
            weight_decay=values.weight_decay,
            refresh=values.refresh if self.weighted else 0,
            adapt=self.adapt_step,
            start=None if self.start_by == "gaussian" else ScoreStart(values.start_steps, values.start_noise),
        )

    def _values(self, data: Data) -> Defaults:
        """All options that have defaults, with these in place of None."""
        defaults = IMAGES if len(data.event_shape) == 3 else VECTORS
        if self.sampler in ("ula", "mala"):
            defaults = replace(defaults, step_size=defaults.step_size**2)
        given = {field.name: getattr(self, field.name) for field in fields(Defaults)}
        return replace(defaults, **{name: value for name, value in given.items() if value is not None})

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
        if self.compare or self.start_by == "gaussian":
            why = f"{'--compare' if self.compare else '--start-by gaussian'} begins with particles of the Gaussian"
            idle |= dict.fromkeys(("start_steps", "start_noise"), why)
        if not self.compare:
            idle |= {"seeds": "it is the number of runs of --compare"}
            return idle if self.weighted else idle | {"refresh": "particles without weights are not drawn afresh"}
        return idle | {
            "lr": "--compare searches the learning rate of every method",
            "adapt_step": "--compare holds the step size fixed",
            "refresh": "--compare never draws particles afresh",
            "weighted": "--compare runs methods with weights and without",
            "keep": "--compare has no checkpoints, but one line of metrics.jsonl for every training",
            "long_chains": "--compare is for laws of the plane",
            "start_by": "--compare begins with particles of the Gaussian",
        }


def defaults_table() -> str:
    """The defaults as the table of the documentation."""
    lines = ["| option | vectors | images |", "|---|---|---|"]
    lines += [
        f"| `{option(name)}` | {value} | {getattr(IMAGES, name)} |"
        for name, value in asdict(VECTORS).items()
        if name != "seeds"
    ]
    return "\n".join(lines)
