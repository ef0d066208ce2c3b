"""What the loops over denoising chains share: a chain, an estimator of the gradient, and a timetable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError, check_integer, check_type, trying
from implicit_diffusion.gradients import Adjoint, Estimator
from implicit_diffusion.gradients.estimator import check_rows
from implicit_diffusion.gradients.loss_scaling import computes_in_float16
from implicit_diffusion.loops.base import Loop, check_same
from implicit_diffusion.loops.timetable import Timetable
from implicit_diffusion.loops.update import Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective, TerminalObjective
from implicit_diffusion.samplers.chain import TRIAL, Chain

FLOAT16_ADVICE = "; the network computes in float16, which ends at 65504: use `precision=torch.bfloat16`, or float32"


class ChainLoop(Loop):
    """A loop over the trajectories of a chain.

    Args:
        chain: the sampler, whose denoiser is trained in place.
        objective: F, e.g. `Reward(r) + beta * PathKL()`.
        update: a torch optimizer, or an `Update` around one.
        batch: samples of a trajectory, injected together (B); those of all processes.
        noise: source of every random number.
        estimator: of the gradient; `Adjoint()` if None.
        stride: rows of the chain per iteration; all of them if None.

    Raises:
        InvalidInputError: a batch below one, or one that the processes cannot share equally; a stride outside of 1..N;
            an optimizer that does not move the denoiser; rows that all keep the pretrained network; an estimator whose
            rows are not the last ones; a chain or an objective that lacks what the estimator needs, a running cost
            without a finite value on the chain's rows, or a term that needs a density; a model or noise that differs
            between processes.
    """

    def __init__(
        self,
        chain: Chain,
        objective: Objective,
        update: Update | torch.optim.Optimizer,
        *,
        batch: int,
        noise: Noise,
        estimator: Estimator | None,
        stride: int | None,
    ) -> None:
        batch = check_integer("batch", batch)
        processes.check_divides("batch", batch)
        check_type("chain", chain, Chain, "use Chain(denoiser, table, event_shape); a potential is trained by Single")
        self.estimator: Estimator = Adjoint() if estimator is None else estimator
        check_type("estimator", self.estimator, Estimator, "use Adjoint(), for example")
        super().__init__(chain.denoiser, "denoiser", objective, update, noise)
        if isinstance(chain.reference, nn.Module):
            check_same(noise, reference=chain.reference)
        self.chain, self.batch = chain, batch
        self.stride = chain.num_steps
        if stride is not None:
            self.stride = check_integer("stride", stride, 1, chain.num_steps, note=" (the chain's steps)")
        self.update.advice = FLOAT16_ADVICE if computes_in_float16(chain.denoiser) else ""
        for _, cost in objective.running:
            cost.check(chain.table, chain.trained_rows)
        with trying("denoiser", f"states of shape {(2, *chain.event_shape)}"):
            end = chain.endpoint(chain.sample(noise, 2, TRIAL), noise, TRIAL)
        for _, terminal in objective.terminal:
            with trying(terminal.name, f"samples of shape {(2, *chain.event_shape)}"):
                terminal.check_value(end)
        self.estimator.check(chain, objective, end)
        for _, term in objective.stationary:
            if not isinstance(term, TerminalObjective):
                raise InvalidInputError(
                    f"{type(term).__name__} needs the density of the samples, which a denoising chain does not have; "
                    "on a chain use PathKL to stay near the pretrained model, MMD or Sinkhorn to approach data"
                )
        self._timetables: dict[range, Timetable] = {}
        if not self.timetable.moving:
            first = self.timetable.rows.start
            raise InvalidInputError(
                f"nothing would be trained: the rows that {self.estimator.name} pulls back, {first}.."
                f"{chain.num_steps - 1} of the chain, keep the pretrained network; leave a row out of pretrained_rows"
            )
        self.injected = 0  # trajectories begun
        self.evaluations = 0  # network calls × samples, of u_θ and of u_0, in all processes

    @property
    def timetable(self) -> Timetable:
        """When a trajectory moves over which row."""
        return self._timetable(self.estimator.rows(self.chain))

    def _timetable(self, rows: range) -> Timetable:
        """That of a trajectory which is pulled back over these rows; made once."""
        if rows not in self._timetables:
            check_rows(self.estimator, self.chain, rows)
            self._timetables[rows] = Timetable(self.chain.num_steps, self.stride, rows, self.chain.pretrained_rows)
        return self._timetables[rows]

    @property
    def unreported(self) -> list[str]:
        """Names of the running costs that metrics lack: all of them where the estimator leaves out rows."""
        known = self.estimator.reports_costs(self.chain)
        return [] if known else [cost.name for _, cost in self.objective.running]

    def _words(self) -> Iterable[str]:
        return f"batch={self.batch}", *super()._words()

    def _parts(self) -> dict[str, object]:
        return {"chain": self.chain, "estimator": self.estimator} | super()._parts()

    def cost(self) -> dict[str, int]:
        """`network_evaluations`: calls of u_θ and u_0 × samples that this loop has made."""
        return {"network_evaluations": self.evaluations}

    def state_dict(self) -> dict[str, Any]:
        own = {"injected": self.injected, "evaluations": self.evaluations}
        return super().state_dict() | own | {"estimator_state": self.estimator.state_dict()}

    def _like(self) -> dict[str, Any]:
        chain = {"steps": self.chain.num_steps, "event_shape": list(self.chain.event_shape)}
        return super()._like() | {"batch": self.batch, "estimator": self.estimator.name} | chain

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.injected, self.evaluations = state["injected"], state["evaluations"]
        self.estimator.load_state_dict(state["estimator_state"])
