"""The parameter step, θ ← θ − η Γ: add up over processes, check, clip, step, schedule, average."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError, NonFiniteError, check_integer, check_number, check_type
from implicit_diffusion.frozen import (
    check_complete,
    copied,
    load_trained_state,
    parametrizations,
    refuse_inference_mode,
    train_once,
    trained_state,
)
from implicit_diffusion.loops import optimizers
from implicit_diffusion.loops.optimizers import Before, Schedule, check_optimizer, check_schedule, failed_step, largest
from implicit_diffusion.loops.step_rules.watched_weights import Segment
from implicit_diffusion.showing import Shown, brief


class Update(Shown):
    """One optimizer step per call of `step`, from the gradients that estimators left in `.grad`.

    What moved θ, Γ averaged and clipped, stays in `.grad` until the next step begins; None if θ did not move.

    Args:
        optimizer: any torch optimizer whose `step` needs no closure.
        schedule: a torch learning-rate scheduler of that optimizer, stepped after every update, without arguments.
        max_grad_norm: clip the norm of Γ to this value.
        ema_decay: keep an exponential moving average of the model: θ̄ = θ after the first update, and
            θ̄ ← decay·θ̄ + (1 − decay)·θ after every other.
        accumulate: average Γ over this many calls before each update.

    Raises:
        InvalidInputError: an optimizer that needs a closure; a schedule that needs a metric or is another optimizer's;
            a bound or count that is not positive.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        schedule: Schedule | None = None,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        accumulate: int = 1,
    ) -> None:
        check_optimizer(optimizer)
        if schedule is not None:
            check_schedule(schedule, optimizer)
        unbounded = isinstance(max_grad_norm, float) and max_grad_norm == math.inf
        if max_grad_norm is not None and not unbounded:
            max_grad_norm = check_number("max_grad_norm", max_grad_norm, 0, note=", or None")
        if ema_decay is not None:
            ema_decay = check_number("ema_decay", ema_decay, 0, 1, note=", e.g. 0.99, or None")
        self.optimizer, self.schedule = optimizer, schedule
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.accumulate = check_integer("accumulate", accumulate)
        self.ema: AveragedModel | None = None
        self.bound = False
        self.updates = 0  # optimizer steps made
        self.pending = 0  # gradients accumulated since
        self.advice = ""  # what to change if numbers overflow, for messages

    def _words(self) -> Iterable[str]:
        yield type(self.optimizer).__name__
        yield f"lr={float(self.optimizer.param_groups[0]['lr']):.4g}"
        held = {name: getattr(self, name) for name in ("schedule", "max_grad_norm", "ema_decay")}
        held |= {"accumulate": self.accumulate if self.accumulate > 1 else None, "updates": self.updates}
        held["pending"] = self.pending or None
        yield from (f"{name}={brief(value)}" for name, value in held.items() if value is not None)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that the optimizer moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def bind(self, model: Any, role: str = "model") -> nn.Module:
        """Tie the update to the model that it moves, and return it; called by the loops.

        Args:
            model: the module that the sampler runs on.
            role: what it is called in messages.

        Raises:
            InvalidInputError: not a module; an optimizer that moves no trainable parameter of it; an update that serves
                another loop; lazy layers without weights.
        """
        refuse_inference_mode()
        if self.bound:
            raise InvalidInputError("update already serves another loop, whose count it keeps; make a new Update")
        check_type(f"the {role}", model, nn.Module, "what is trained is a module that owns its parameters")
        own = {id(p) for p in model.parameters()}
        held = [p for p in self.parameters if id(p) in own]
        if not held:
            raise InvalidInputError(
                f"optimizer holds none of the {role}'s parameters: build it from the parameters of the same module "
                "that the sampler runs on"
            )
        if not any(p.requires_grad for p in held):
            raise InvalidInputError(
                f"every parameter of the {role} that the optimizer holds is frozen; call requires_grad_() on some"
            )
        module: nn.Module = model
        check_complete(module)
        self.model, self.bound, self.parametrized = module, True, parametrizations(module)
        self.begin()
        if self.ema_decay is not None:
            average = get_ema_multi_avg_fn(self.ema_decay)
            self.ema = AveragedModel(copied(module), multi_avg_fn=average).requires_grad_(False)
        return module

    def begin(self) -> None:
        """Drop what `.grad` holds from elsewhere, or from the last update: Γ is added to what is there."""
        refuse_inference_mode()
        if not self.pending:
            self.optimizer.zero_grad(set_to_none=True)

    def step(
        self,
        watched: Sequence[Tensor],
        diagnose: Callable[[], str | None],
        norm: Tensor | None = None,
        shorten: Callable[[Segment], float] | None = None,
    ) -> dict[str, Any]:
        """Count the gradient in `.grad`; once there are enough, clip, move θ, and go back unless all is finite.

        Of several processes each has a part of it in `.grad`, and all move θ by their sum.
        The check reads one number, for which the host waits; nothing else here waits. It is read after the step, and so
        covers the optimizer as well, whose own arithmetic may fail on a sound gradient.

        Args:
            watched: tensors that must be finite as well.
            diagnose: says in words what is not finite, or None.
            norm: of all the gradients, if it is known already and none were accumulated before.
            shorten: moves θ back along the optimizer's step, and returns the share of the step that remains.

        Returns:
            metrics: `grad_norm` (before clipping), `lr`, with `shorten` `step_share`; none while gradients accumulate.

        Raises:
            NonFiniteError: NaN or infinity; θ and the optimizer's state are as before, and the gradient is dropped.
        """
        for p in self.parameters:
            if p.grad is not None and p.grad.layout is torch.sparse_coo:  # of embeddings; it has no norm
                p.grad = p.grad.to_dense()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        waits = self.pending + 1 < self.accumulate
        if not waits:
            processes.sum_gradients([g for g in gradients if not processes.is_part(g)])
        if norm is None or self.pending or processes.count() > 1:
            norm = optimizers.norm_of(gradients)
        alarm = processes.total(sum((x.sum().float() for x in watched), start=norm.float()))  # NaN and ∞ spread
        if waits:
            if not math.isfinite(alarm):
                raise self._stop(diagnose)
            self.pending += 1
            return {}
        if self.accumulate > 1:
            torch._foreach_mul_([processes.own(g) for g in gradients], 1 / self.accumulate)
            norm = norm / self.accumulate
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        lr = self.optimizer.param_groups[0]["lr"]
        moved = [p for p in self.parameters if p.grad is not None]
        before = Before(self.optimizer, moved)
        try:
            self.optimizer.step()
            sound = math.isfinite(alarm + largest(moved))
            made = {} if shorten is None or not sound else {"step_share": shorten(Segment(moved, before.theta))}
        except BaseException as error:  # an interrupt as well: no half step stays
            before.undo(error)
            raise
        if not sound:
            lost = math.isfinite(alarm) and failed_step(self.optimizer, moved, len(self.parameters))
            before.restore()
            raise self._stop(diagnose if not lost else lambda: lost)
        self.pending = 0
        self._made(1)
        train_once(self.parametrized)
        if self.schedule is not None:
            self.schedule.step()
        if self.ema is not None:
            self._average(self.ema)
        return {"grad_norm": norm, "lr": lr} | made

    @property
    def optimizer_only(self) -> bool:
        """Whether an update is the optimizer's step and nothing else, so that it may be compiled along (`masked`)."""
        hooks = getattr(self.optimizer, "_optimizer_step_pre_hooks", {}) or getattr(
            self.optimizer, "_optimizer_step_post_hooks", {}
        )
        more = self.schedule or self.max_grad_norm or self.ema_decay or self.parametrized
        return self.accumulate == 1 and not (more or hooks)

    def masked(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], ok: Tensor) -> Tensor:
        """The optimizer's step if `ok` and θ stays finite, nothing otherwise: without branches or waits.

        Returns:
            a number that is not finite where it is θ that did not stay finite.
        """
        state = (t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        held = [*parameters, *state]
        before = [t.detach().clone() for t in held]
        with torch.no_grad():
            for p, g in zip(parameters, gradients):
                if g is not None:
                    if p.grad is None:
                        p.grad = torch.empty_like(p)
                    p.grad.copy_(g)
            inspect.unwrap(type(self.optimizer).step)(self.optimizer)  # its wrappers profile, and stop compilation
            overflow = torch.where(ok, largest([p for p, g in zip(parameters, gradients) if g is not None]), 0)
            ok = ok & overflow.isfinite()
            for t, old in zip(held, before):
                t.copy_(torch.where(ok, t, old))
        return overflow

    def account(
        self,
        alarm: Tensor,
        diagnose: Callable[[], str | None],
        norm: Tensor,
        count: int,
        overflow: Tensor | float = 0.0,
    ) -> dict[str, Any]:
        """Count `count` masked updates, and stop if one of them was not made. Returns and raises as `step`.

        Args:
            alarm: finite where all of them were made.
            diagnose: as in `step`.
            norm: of the last gradient.
            count: of updates.
            overflow: the sum of what `masked` returned.
        """
        if not math.isfinite(alarm):
            raise self._stop(
                diagnose if math.isfinite(overflow) else lambda: failed_step(self.optimizer, [], len(self.parameters))
            )
        self._made(count)
        return {"grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]}

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on, except the model's own parameters."""
        state: dict[str, Any] = {"optimizer": optimizers.whole_state(self.optimizer), "updates": self.updates}
        state["schedule"] = None if self.schedule is None else self.schedule.state_dict()
        state["ema"] = None if self.ema is None else trained_state(self.ema, like=self.model, prefix="module.")
        state["gradients"] = optimizers.parts_of_gradients(self.parameters) if self.pending else None
        return state | {"pending": self.pending}

    def like(self) -> dict[str, Any]:
        """What a state and the update that continues from it must have in common, by name."""
        return {
            "optimizer": type(self.optimizer).__name__,
            "parameters": [len(group["params"]) for group in self.optimizer.param_groups],
            "schedule": None if self.schedule is None else type(self.schedule).__name__,
            "average": self.ema is not None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        optimizers.load_whole_state(self.optimizer, state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        if self.ema is not None:
            load_trained_state(self.ema, state["ema"])
        self.updates, self.pending = state["updates"], state["pending"]
        optimizers.load_gradients(self.parameters, state["gradients"] or [None] * len(self.parameters))

    @torch.no_grad()
    def _average(self, ema: AveragedModel) -> None:
        """`update_parameters` without its copy of the count to the device, once the average has begun."""
        if ema.n_averaged == 0 or ema.multi_avg_fn is None:
            ema.update_parameters(self.model)
            return
        ema.multi_avg_fn(list(ema.module.parameters()), list(self.model.parameters()), ema.n_averaged)
        for averaged, own in zip(ema.module.buffers(), self.model.buffers(), strict=True):
            averaged.copy_(own)
        ema.n_averaged += 1

    def _made(self, count: int) -> None:
        self.updates += count
        torch.clear_autocast_cache()  # of the weights as they were, for calls between two steps

    def _stop(self, diagnose: Callable[[], str | None]) -> NonFiniteError:
        seen = diagnose(), optimizers.unsound_gradients(self.parameters)
        reasons, bad = zip(*(processes.collected(seen) if processes.count() > 1 else [seen]))  # one of them knows why
        reason = next(filter(None, (*reasons, *bad)), "the particles or the norm of the gradient overflow")
        self.pending = 0
        self.begin()
        return NonFiniteError(f"{reason}; θ was left as it was before the update{self.advice}")
