"""Reward: F(p) = −E_p R."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, NonFiniteError, shown
from implicit_diffusion.function_checks import BY_TORCH, check_own_gradient, check_separate, check_slope
from implicit_diffusion.objectives.base import TerminalObjective, check_name
from implicit_diffusion.particles import Particles
from implicit_diffusion.reward_values import scores_of, takes_condition
from implicit_diffusion.showing import brief

TRIED = 8  # particles that a black box is tried on, beside all for its form


class Reward(TerminalObjective):
    """Maximise the expectation of a function of the samples: F(p) = −E_p R.

    On chains the adjoint needs ∇R. Under a stationary law R may be a black box: F′ = −R is all that counts.

    Args:
        function: R, any callable from samples of shape (n, *event) to rewards of shape (n,), in the samples' dtype, or
            in another form that `scores.scores_of` reads: a column (n, 1), a pair (scores, info), a dict. Each reward
            depends on its own sample alone. One that takes two arguments, R(x, condition), is also given what the
            samples were sampled under: tensors by name, as the denoiser gets them.
        name: under which metrics report it.

    Raises:
        InvalidInputError: no function, one that takes neither one argument nor two, or no name.
    """

    probed = False  # whether `check`, or `probe`, has passed it

    def __init__(self, function: Callable[..., Any], name: str = "reward") -> None:
        if isinstance(function, type) or not callable(function):
            make = f"; take an instance of it, {function.__name__}(...)" if isinstance(function, type) else ""
            raise InvalidInputError(f"reward must be a function of samples, got {shown(function)}{make}")
        self.function, self.name, self.conditional = function, check_name(name), takes_condition(function)

    def _words(self) -> Iterable[str]:
        return (f"function={brief(self.function)}", f"name={self.name!r}", *["conditional"] * self.conditional)

    def of(self, particles: Particles) -> Shaped[Tensor, " n"]:
        """R at the particles: R(x), or R(x, condition) where it takes two arguments.

        Raises:
            InvalidInputError: it takes two, but the particles were sampled under nothing; what it returns is not one
                number per sample.
        """
        if not self.conditional:
            return scores_of(self.function(particles.x), particles.x)
        if particles.condition is None:
            raise InvalidInputError(
                "reward takes two arguments, the samples and what they were sampled under (prompts, class labels), but "
                "these samples come without a condition; take a reward of the samples alone, or a model (in Python, a "
                "chain) that is sampled under one"
            )
        return scores_of(self.function(particles.x, particles.condition), particles.x)

    def judge(self, particles: Particles) -> Float[Tensor, " n"]:
        """R at samples that are to be judged, as floating-point numbers; it need not be differentiable.

        Raises:
            InvalidInputError: not one number per sample.
            NonFiniteError: NaN or infinity.
        """
        reward = self.of(particles)
        reward = reward if reward.is_floating_point() else reward.to(particles.x.dtype)
        if not reward.isfinite().all():
            bad = int((~reward.isfinite()).sum())
            raise NonFiniteError(f"the reward of {bad} of {len(reward)} samples is NaN or infinite")
        return reward

    def value(self, particles: Particles) -> Float[Tensor, ""]:
        return -particles.mean(self.of(particles))

    def first_variation(self, particles: Particles) -> tuple[Float[Tensor, " n"], Float[Tensor, ""]]:
        reward = self.of(particles)
        return -reward, -particles.mean(reward)

    def report(self, value: Float[Tensor, ""]) -> tuple[str, Tensor]:
        """The reward itself, E_p R."""
        return self.name, -value

    def check(self, particles: Particles) -> None:
        """Try the reward on a few samples: five calls, one of them with its gradient, and that one alone once `probed`.

        A reward that is random, or flat at all of the samples, is told by a warning, once.

        Raises:
            InvalidInputError: another shape than (n,), another dtype, NaN or infinity, no gradient, one that is 0 at
                all samples though their rewards differ, or samples that influence each other's rewards.
        """
        x = particles.x.detach().clone().requires_grad_()
        with torch.enable_grad(), self.evaluating():
            with warnings.catch_warnings():  # of float(tensor): its advice, .detach(), is refused below
                warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
                reward = self.of(Particles(x, condition=particles.condition))
            if not reward.requires_grad:  # before the dtype: integers would not have a gradient in another one either
                raise InvalidInputError(
                    "reward is not differentiable, and fine-tuning follows its gradient: its result does not depend on "
                    f"the samples through torch operations; {BY_TORCH}, and without integers and comparisons"
                )
            _check_dtype(reward, x)
            gradient = torch.autograd.grad(reward.sum(), x, allow_unused=True, retain_graph=True)[0]
            if gradient is None:
                raise InvalidInputError("reward is not differentiable: its result does not depend on the samples")
            of_first = torch.autograd.grad(reward[0], x)[0]
        reward = reward.detach()
        for what, tensor in (("values", reward), ("a gradient", gradient)):
            _check_finite(what, tensor)
        check_own_gradient("reward", of_first)
        new = not self.probed
        if new:
            self._check_separate(particles, reward)
        check_slope("reward", gradient, reward, warn=new)

    def check_stationary(self, particles: Particles, energy: Float[Tensor, " n"]) -> None:
        """Raises InvalidInputError: another shape than (n,), another dtype, NaN or infinity, or samples that influence
        each other's rewards.
        """
        with torch.no_grad(), self.evaluating():
            x = particles.x.clone()  # a black box may write into what it is given
            reward = self.of(Particles(x, condition=particles.condition))
            _check_dtype(reward, x)
            _check_finite("values", reward)
        self.probe(particles)
        if len(reward) > 1 and bool(reward.max() == reward.min()):
            warnings.warn(
                f"reward is the same at all {len(reward)} particles: there is nothing to learn from them until some "
                "reach another one",
                stacklevel=2,
            )

    @torch.no_grad()
    def probe(self, particles: Particles) -> None:
        """Try on a few samples whether each reward depends on its own sample alone: five calls, without a gradient.

        One that gives the same samples other values at a second call is told by a warning.

        Raises:
            InvalidInputError: samples that influence each other's rewards; not one number per sample.
            NonFiniteError: NaN or infinity.
        """
        few = _chosen(particles, torch.arange(min(TRIED, len(particles.x)), device=particles.x.device))
        with self.evaluating():
            self._check_separate(few, self.judge(_chosen(few, torch.arange(len(few.x), device=few.x.device))))

    def _check_separate(self, particles: Particles, values: Tensor) -> None:
        with self.evaluating():
            check_separate("reward", lambda index: self.judge(_chosen(particles, index)), values)
        self.probed = True


def as_reward(reward: Callable[..., Any] | Reward) -> Reward:
    """A `Reward` as it is, and that of a function."""
    return reward if isinstance(reward, Reward) else Reward(reward)


def _chosen(particles: Particles, index: Tensor) -> Particles:
    """Copies of the samples with these numbers, and of their conditions; a black box may write into them."""
    given = particles.condition
    condition = None if given is None else {name: value[index] for name, value in given.items()}
    return Particles(particles.x.detach()[index], condition=condition)


def _check_dtype(reward: Tensor, x: Tensor) -> None:
    if reward.dtype != x.dtype:
        raise InvalidInputError(
            f"reward must return the dtype of the samples, {x.dtype}, got {reward.dtype}; end it with .to(x.dtype)"
        )


def _check_finite(what: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise InvalidInputError(f"reward gives {what} that are NaN or infinite on samples of the initial model")
