"""Read a chain's table off a diffusers scheduler.

With clipping off, one call of `scheduler.step` computes

    x_{k+1} = a_k x_k + b_k u + s_k ξ,

whatever its formula. So the coefficients are not derived again for every scheduler and option, they are
*probed*: each row gets a new copy of the scheduler, a float64 batch of five samples, and a noise ξ that is
drawn a second time from the same seed.

    sample 0      x = u = 0                s_k = ⟨ξ, y⟩/⟨ξ, ξ⟩, so that even DDPM's 1e−10 keeps its digits
    sample 1      x, u ~ N(0, I)           a_k, b_k by least squares of y − s_k ξ on (x, u)
    samples 2–4   of scales 1e−2, 1, 1e2   (a_k, b_k, s_k) must reproduce them, or something clips or thresholds

and m_k comes from `scale_model_input` in the same way. Finally, one roll-out through all rows with unrelated u
must follow the table; with hidden state (multistep solvers) it does not.

Many schedulers count their calls instead of reading t. So a new copy is set to its row by `set_begin_index`, which also
distinguishes two rows that share a rounded timestep; the roll-out starts without it, as pipelines do. Some schedulers
cast the state, or the noise that they draw, to float32: x is drawn so that float32 holds it exactly, and ξ in both
precisions, of which the one that fits better is used.

The schedulers of diffusers keep their coefficients in float32. They are read as they are, because the chain must be the
one that diffusers runs. Near t = 0, where 1 − ᾱ_t is a difference of float32 numbers, they are off by up to a relative
5e−4 (DDPM's default noise schedule, N = 1000; 8e−5 up to N = 50), and so is the table.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, NonAffineError
from implicit_diffusion.noise import Noise
from implicit_diffusion.tables.refusals import (
    check_num_steps,
    check_scheduler,
    check_shift,
    check_step_options,
    refuse_what_is_no_table,
    wrong_number_of_timesteps,
)
from implicit_diffusion.tables.table import ChainTable

EVENT = (2, 8, 8)  # an image to the scheduler, 128 equations to least squares
PROBES = (0.0, 1.0, 1e-2, 1.0, 1e2)  # scale of x and u in each sample
TOLERANCE = 1e-5  # relative; float32 inside a scheduler makes 1e−7, a clip or a second order 1e−2 and more
PROBE_NOISE = Noise(seed=0)
STATE, OUTPUT, XI = range(3)  # keys of a probe's x, u and ξ
ALL_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas")


class Row(NamedTuple):
    """Coefficients of one step."""

    a: float
    b: float
    s: float
    m: float


def read_table(scheduler: Any, num_steps: int, *, mu: float | None = None, **step_options: Any) -> ChainTable:
    """The table of the chain that `scheduler` runs in `num_steps` steps.

    Args:
        scheduler: a diffusers scheduler; it is copied, not changed. `implicit_diffusion.tables.verified` lists
            what is tested: DDPM, DDIM, Euler, ancestral Euler, flow-matching Euler and first-order DPM-Solvers.
        num_steps: N, from 1 to the scheduler's number of training timesteps.
        mu: exponent of the resolution-dependent time shift, for schedulers with use_dynamic_shifting=True.
        **step_options: passed on to every `scheduler.step`, for example eta=1.0 for DDIM.

    Returns:
        N rows with the scheduler's timesteps as t_k, its `init_noise_sigma` as `initial_std`, and h_k = 1/N.

    Raises:
        NonAffineError: the scheduler's step is not an affine function of (x, u, ξ), or it has hidden state
            (clipping, thresholding, learned variances, second-order and multistep solvers). The message says
            what to change.
        InvalidInputError: num_steps is out of range, a step option is unknown or refused, a coefficient is not
            finite, the scheduler itself refuses its options, or `scheduler` is not a diffusers scheduler.
    """
    check_scheduler(scheduler)
    num_steps = check_num_steps(scheduler, num_steps)
    check_step_options(scheduler, step_options)  # before the timesteps are set
    refuse_what_is_no_table(scheduler)
    check_shift(scheduler, mu)
    prepared = copy.deepcopy(scheduler)
    try:
        prepared.set_timesteps(num_steps, **({} if mu is None else {"mu": mu}))
    except Exception as error:  # ValueError, TypeError, KeyError, AssertionError, ... by scheduler
        raise InvalidInputError(f"{type(scheduler).__name__} cannot make {num_steps} timesteps: {error}") from error
    return read_prepared(prepared, num_steps, mu=mu, **step_options)


def read_prepared(scheduler: Any, num_steps: int, *, mu: float | None = None, **step_options: Any) -> ChainTable:
    """As `read_table`, of a scheduler whose timesteps have been set, by a pipeline for example; `mu` is for its name.

    Raises:
        NonAffineError: as `read_table`.
        InvalidInputError: as `read_table`.
    """
    check_step_options(scheduler, step_options)
    refuse_what_is_no_table(scheduler)
    probe = _Probe(scheduler, num_steps, step_options)
    rows = [probe.read(k) for k in range(num_steps)]
    probe.verify_roll_out(rows)

    columns = torch.tensor(rows, dtype=torch.float64)
    return ChainTable(
        a=columns[:, 0],
        b=columns[:, 1],
        s=columns[:, 2],
        m=columns[:, 3],
        t=probe.timesteps.double(),
        h=torch.full((num_steps,), 1.0 / num_steps, dtype=torch.float64),
        initial_std=float(getattr(probe.scheduler, "init_noise_sigma", 1.0)),
        name=_name(scheduler, num_steps, mu, step_options),
    )


@dataclass
class _Probe:
    """A scheduler set to N steps, whose rows are read one by one."""

    scheduler: Any
    num_steps: int
    step_options: Mapping[str, Any]

    def __post_init__(self) -> None:
        name = type(self.scheduler).__name__
        self.timesteps: Tensor = self.scheduler.timesteps
        self.takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        self.noise: list[Tensor] = []  # ξ of every row read so far, in the precision in which the scheduler draws it
        if len(self.timesteps) != self.num_steps:
            raise NonAffineError(wrong_number_of_timesteps(self.scheduler, self.num_steps))
        if self.num_steps > 1 and self.timesteps[0] == self.timesteps[1]:
            raise InvalidInputError(
                f"{name} in {self.num_steps} steps: its first two timesteps are both {float(self.timesteps[0]):g}, and "
                "diffusers then begins with the second; use fewer steps."
            )

    def read(self, k: int) -> Row:
        """Row k by least squares on samples 0 and 1, verified on the others."""
        scale = torch.tensor(PROBES, dtype=torch.float64).reshape(-1, 1, 1, 1)
        x, u = (scale * _normal(k, STATE)).float().double(), scale * _normal(k, OUTPUT)
        y, scaled = self._step(self._fresh(k), k, x, u)
        if not (y.isfinite().all() and scaled.isfinite().all()):
            raise InvalidInputError(
                f"{self._where(k)}: the step is not finite. Usual causes: DDIM with eta > 1 (the square root of a "
                "negative variance); prediction_type='epsilon' at zero terminal SNR (rescale_betas_zero_snr=True), "
                "where x_0 cannot be distinguished from the noise; shift_terminal with a single step."
            )

        s, xi = self._fit_noise(k, y[0])
        self.noise.append(xi)
        a, b = _fit(y[1] - s * xi[1], x[1], u[1])
        m = _dot(x[1], scaled[1]) / _dot(x[1], x[1])
        row = Row(a, b, s, m)
        for i in range(2, len(PROBES)):
            residual = max(_residual(y[i], a * x[i], b * u[i], s * xi[i]), _residual(scaled[i], m * x[i]))
            if not residual <= TOLERANCE:
                raise NonAffineError(
                    f"{self._where(k)}: its step is not affine in (x, u, noise): relative residual "
                    f"{residual:.1e} at inputs of scale {PROBES[i]:g}. Something clips, thresholds or is "
                    "random in a way that the generator does not control; switch it off, or use "
                    "DDPMScheduler or DDIMScheduler."
                )
        return row

    def _fit_noise(self, k: int, y: Tensor) -> tuple[float, Tensor]:
        """(s, ξ) of y = s ξ for sample 0, with ξ in the precision that fits better."""
        fits = []
        for dtype in (torch.float64, torch.float32):
            xi = _normal(k, XI, dtype=dtype).double()
            s = _dot(xi[0], y) / _dot(xi[0], xi[0])
            fits.append((_residual(y, s * xi[0]), s, xi))
        _, s, xi = min(fits, key=lambda fit: fit[0])
        return s, xi

    def verify_roll_out(self, rows: list[Row]) -> None:
        """One scheduler through all rows, its own x and unrelated u: each step must still be that of the table."""
        scheduler, y = self._fresh(), _normal(0, STATE)
        for k, row in enumerate(rows):
            x, u = y.float().double(), _normal(k, OUTPUT)
            y, _ = self._step(scheduler, k, x, u)
            residual = _residual(y, row.a * x, row.b * u, row.s * self.noise[k])
            if not residual <= TOLERANCE:
                raise NonAffineError(
                    f"{self._where(k)}: after the rows before it, its step differs from the same step of a "
                    f"fresh scheduler (relative residual {residual:.1e}): it remembers earlier network "
                    "outputs, as second-order and multistep solvers do. Use DDPMScheduler or DDIMScheduler."
                )

    def _fresh(self, row: int | None = None) -> Any:
        """A copy with its own state, set to `row`. The config, which most of a copy's time would go into, is shared."""
        config = self.scheduler.config
        scheduler = copy.deepcopy(self.scheduler, {id(config): config})
        if row is not None and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(row)
        return scheduler

    def _step(self, scheduler: Any, k: int, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """(x_{k+1}, m_k x) from `scheduler` on row k, with noise from the generator of `_normal(k, XI)`."""
        t = self.timesteps[k]
        options = dict(self.step_options)
        if self.takes_generator:
            options["generator"] = PROBE_NOISE.generator(k, XI)
        try:
            # Before the step, as pipelines do: some schedulers look up their row here; some have no scaling.
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            y = scheduler.step(u, t, x, return_dict=False, **options)[0]
        except IndexError as error:
            raise InvalidInputError(
                f"{self._where(k)}: the scheduler has no such timestep ({error}); lower its steps_offset."
            ) from error
        except Exception as error:  # NotImplementedError, ValueError, TypeError, RuntimeError, ... by scheduler
            raise InvalidInputError(f"{self._where(k)}: the call scheduler.step(u, t, x) fails: {error}") from error
        return y.double(), scaled.double()

    def _where(self, k: int) -> str:
        name = type(self.scheduler).__name__
        return f"{name} in {self.num_steps} steps, row {k} (t = {float(self.timesteps[k]):g})"


def _residual(y: Tensor, *terms: Tensor) -> float:
    """Largest |y − Σ terms|, relative to the largest entry of any term. NaN stays NaN."""
    size = max(float(term.abs().max()) for term in terms)
    return float((y - sum(terms)).abs().max()) / (size or 1.0)


def _normal(*key: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Drawn as the scheduler draws it from `PROBE_NOISE.generator(*key)`."""
    return PROBE_NOISE.normal((len(PROBES), *EVENT), *key, dtype=dtype)


def _fit(y: Tensor, x: Tensor, u: Tensor) -> tuple[float, float]:
    """(a, b) of y = a x + b u by least squares, the same to the last bit in every process."""
    xx, xu, uu, a, b = _dot(x, x), _dot(x, u), _dot(u, u), 0.0, 0.0
    for _ in range(2):  # the second pass fits what rounding left
        rest = y - a * x - b * u
        xr, ur = _dot(x, rest), _dot(u, rest)
        a, b = a + (uu * xr - xu * ur) / (xx * uu - xu**2), b + (xx * ur - xu * xr) / (xx * uu - xu**2)
    return a, b


def _dot(x: Tensor, y: Tensor) -> float:
    """⟨x, y⟩ with an exact sum: those of linear algebra libraries depend on where the numbers lie in memory."""
    return math.fsum((x * y).flatten().tolist())


def _name(scheduler: Any, num_steps: int, mu: float | None, step_options: Mapping[str, Any]) -> str:
    """One line for reports, such as "DDPM, 10 steps, trailing, fixed_small, epsilon"."""
    config = scheduler.config
    parts = [type(scheduler).__name__.removesuffix("Scheduler"), f"{num_steps} steps"]
    options = (config.get(key) for key in ("timestep_spacing", "variance_type", "prediction_type", "algorithm_type"))
    parts += [option for option in options if option]
    parts += [key.removeprefix("use_").removesuffix("_sigmas") + " sigmas" for key in ALL_SIGMAS if config.get(key)]
    parts += [f"shift={config[key]:g}" for key in ("shift", "flow_shift") if config.get(key, 1.0) != 1.0]
    parts += [] if mu is None else [f"mu={mu:g}"]
    parts += [f"{option}={value}" for option, value in step_options.items()]
    return ", ".join(parts)
