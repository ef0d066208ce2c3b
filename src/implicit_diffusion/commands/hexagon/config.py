"""The options of `hexagon`, and what its arms share."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from implicit_diffusion.commands.shared.ranges import at_least, not_negative, positive
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.checkpoints import KEEP
from implicit_diffusion.runs.trackers.opening import TrackerName

NARROWEST = 0.05  # σ that the coarse grid resolves: its cells are as wide, and the error e^{−2π²}
COMPILED_FROM = 20_000  # iterations in all, from which compiling pays


@dataclass(frozen=True)
class Setting:
    """What the arms of one study share.

    Args:
        steps: iterations of the single loop.
        particles: their number.
        sigma: deviation of the Gaussians.
        step_size: h of the Langevin steps.
        lr: η of plain gradient steps.
        forward_kl: weight of KL(π_θ0‖π_θ) beside the reward.
        guidance: λ of V − λ R_smooth.
        grid: of η, for the arms that are tuned.
        compiled: whether the single loop's inner update is.
    """

    steps: int
    particles: int
    sigma: float
    step_size: float
    lr: float
    forward_kl: float
    guidance: float
    grid: tuple[float, ...]
    compiled: bool


@dataclass(frozen=True)
class Config:
    """Reproduce section 5.1 of the paper: optimise the weights of six Gaussians through Langevin sampling."""

    steps: int = 5000
    """Number K of iterations of the single loop; the other methods get as many gradient evaluations."""
    particles: int = 1000
    """Number of particles."""
    seeds: int = 10
    """Number of runs of each method."""
    seed: int = 0
    """Seed of the first run; the other runs use the numbers after it."""
    sigma: float = 1.0
    """Standard deviation of the Gaussians, whose centres lie at radius 4."""
    step_size: float | None = None
    """Step size h of Langevin dynamics; 0.2 σ² by default, with σ from --sigma."""
    lr: float = 0.1
    """Step size η of gradient descent on the parameters θ."""
    forward_kl: float = 0.0
    """Weight of a penalty on KL(π_θ0‖π_θ), the divergence between the initial and the present model."""
    guidance: float = 10.0
    """Strength λ of guidance, the method that samples from V − λ R_smooth without training."""
    tune: bool = False
    """Run the methods "nested" and "unrolled" once more, with the best step size η of --grid.
    The search for it takes several times as long as all the rest."""
    grid: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
    """Step sizes η that --tune tries."""
    compile: bool | None = None
    """Compile the update of the single loop; by default if --steps times --seeds is 20,000 or more."""
    keep: int = KEEP
    """Number of checkpoints to keep: should the newest be damaged, an older one continues the run."""
    out: Path | None = None
    """Folder for the run, new or empty. By default runs/hexagon-<time>."""
    track: tuple[TrackerName, ...] = ()
    """Where else to show the numbers and pictures of the training.
    "tensorboard" writes event files into the folder of the run; "wandb" sends them to Weights & Biases."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range."""
        at_least(self, steps=10, particles=2, seeds=1, seed=0, keep=1)
        positive(self, "sigma", "step_size", "lr")
        not_negative(self, "forward_kl", "guidance")
        if self.sigma < NARROWEST:
            raise InvalidInputError(
                f"--sigma must be at least {NARROWEST}, got {self.sigma}: narrower modes would be lost between the "
                "points of the quadrature"
            )
        if not self.grid or min(self.grid) <= 0:
            raise InvalidInputError(f"--grid must hold positive learning rates, got {self.grid}")

    def resolved(self) -> Config:
        """The same with the defaults that depend on other options."""
        setting = self.setting()
        return replace(self, step_size=setting.step_size, compile=setting.compiled)

    def setting(self) -> Setting:
        """What the arms share, with all defaults."""
        pays = self.steps * self.seeds >= COMPILED_FROM and shutil.which("c++") is not None
        return Setting(
            steps=self.steps,
            particles=self.particles,
            sigma=self.sigma,
            step_size=0.2 * self.sigma**2 if self.step_size is None else self.step_size,
            lr=self.lr,
            forward_kl=self.forward_kl,
            guidance=self.guidance,
            grid=self.grid,
            compiled=pays if self.compile is None else self.compile,
        )
