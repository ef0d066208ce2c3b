"""Reward: F(p) = −E_p R."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, NoGradientError, NonFiniteError, shown
from implicit_diffusion.frozen import modules_in
from implicit_diffusion.function_checks import (
    BY_TORCH,
    NEEDS_NO_SLOPE,
    TRIED,
    check_own_gradient,
    check_separate,
    check_slope,
)
from implicit_diffusion.objectives.attributes import changed, check_name
from implicit_diffusion.objectives.base import TerminalObjective
from implicit_diffusion.objectives.variation import Density, FirstVariation
from implicit_diffusion.particles import Particles
from implicit_diffusion.reward_values import given_as, of_tensors, scores_of, takes_condition
from implicit_diffusion.showing import brief


class Reward(TerminalObjective):
    """Maximise the expectation of a function of the samples: F(p) = −E_p R.

    On chains the adjoint needs ∇R. Under a stationary law R may be a black box, since F′ = −R is all that matters.

    Args:
        function: R, any callable from samples of shape (n, *event) to rewards of shape (n,), in the samples' dtype, or
            in another form that `reward_values.scores_of` reads: a column (n, 1), a list, an array, a pair
            (scores, info), a dict. Each reward depends on its own sample alone. A function of two arguments,
            R(x, condition), also receives what the samples were sampled under: tensors by name, as the denoiser
            receives them. A function whose first argument is annotated as `list[PIL.Image.Image]` or `np.ndarray`
            is called with that (see `reward_values`), and has no gradient.
        name: under which metrics report it.
        checked: whether `probe` has accepted it already, so that checks need not call it so often, nor warn again.

    Raises:
        InvalidInputError: something other than a function of one argument or two, an annotation of its first argument
            that is no form of a batch, or an empty name.
    """

    separable = True

    def __init__(self, function: Callable[..., Any], name: str = "reward", *, checked: bool = False) -> None:
        if isinstance(function, type) or not callable(function):
            make = f"; use an instance of it, {function.__name__}(...)" if isinstance(function, type) else ""
            raise InvalidInputError(f"reward must be a function of samples, got {shown(function)}{make}")
        self.function, self.name, self.conditional = function, check_name(name), takes_condition(function)
        self._of_tensors = of_tensors(function)
        self.checked = checked

    def as_checked(self) -> Reward:
        """The same reward for callers that have checked it."""
        return changed(self, checked=True)

    @property
    def given_as(self) -> str | None:
        """What the function is given in place of tensors, such as "NumPy arrays"; None where it is given tensors."""
        return given_as(self._of_tensors)

    def networks(self) -> Iterable[nn.Module]:
        return modules_in(self.function)

    def _words(self) -> Iterable[str]:
        words = [f"function={brief(self.function)}", f"name={self.name!r}", *["conditional"] * self.conditional]
        return words if self.given_as is None else [*words, f"given {self.given_as}"]

    def of(self, particles: Particles) -> Shaped[Tensor, " n"]:
        """R at the particles: R(x), or R(x, condition) for a function of two arguments.

        Raises:
            InvalidInputError: a function of two arguments, but particles without a condition; something other than one
                number per sample.
        """
        return scores_of(self.called(particles), particles.x)

    def called(self, particles: Particles) -> Any:
        """What the function returns at the particles, in its own form; errors as of `of`."""
        if not self.conditional:
            return self._of_tensors(particles.x)
        if particles.condition is None:
            raise InvalidInputError(
                "reward takes two arguments, the samples and what they were sampled under (prompts, class labels), but "
                "these samples come without a condition; use a reward of the samples alone, or a model (in Python, a "
                "chain) that is sampled under one"
            )
        return self._of_tensors(particles.x, particles.condition)

    def finite_values(self, particles: Particles) -> Float[Tensor, " n"]:
        """R at samples, as floating-point numbers; it need not be differentiable.

        Raises:
            InvalidInputError: not one number per sample.
            NonFiniteError: NaN or infinity.
        """
        return self.scored(particles)[0]

    def scored(self, particles: Particles) -> tuple[Float[Tensor, " n"], Float[Tensor, "n rewards"] | None]:
        """`finite_values`, and the rewards that they are made of, where there are several (`WeightedRewards`)."""
        reward = self._numbers(particles)
        check_values("the reward", reward)
        return reward, None

    def value(self, particles: Particles) -> Float[Tensor, ""]:
        return -particles.mean(self.of(particles))

    def first_variation(self, particles: Particles, density: Density | None = None) -> FirstVariation:
        """F′ = −R; it needs no ∇R."""
        with torch.no_grad():
            reward = self._numbers(particles)
            return FirstVariation(-reward, value=-particles.mean(reward))

    def report(self, value: Float[Tensor, "*runs"]) -> tuple[str, Tensor]:
        """The reward itself, E_p R."""
        return self.name, -value

    def check_value(self, particles: Particles) -> None:
        """Call the reward on a few of the samples, without a gradient: five times, or once where it is `checked`.

        A reward that gives the same samples other values at a second call causes a warning.

        Raises:
            InvalidInputError: not one number per sample, NaN or infinity, or samples that influence each other's
                rewards.
        """
        few = _chosen(particles, slice(TRIED))
        with torch.no_grad(), self.evaluating():
            values = self._numbers(_chosen(few, slice(None)))
            _check_finite("values", values)
            if not self.checked:
                check_separate("reward", lambda index: self.finite_values(_chosen(few, index)), values)

    def check_slope(self, particles: Particles) -> None:
        """Call the reward on samples once, with its gradient.

        One that is flat at all of the samples causes a warning, unless the reward is `checked`.

        Raises:
            NoGradientError: no gradient, or one that is 0 at all samples though their rewards differ.
            InvalidInputError: another dtype than the samples', NaN or infinity in the gradient, or a reward whose
                gradient depends on other samples.
        """
        x = particles.x.detach().clone().requires_grad_()
        with torch.enable_grad(), self.evaluating():
            with warnings.catch_warnings():  # of float(tensor): its advice, .detach(), is refused below
                warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
                reward = self.of(Particles(x, condition=particles.condition))
            if self.given_as is not None:
                raise NoGradientError(
                    f"reward is called with {self.given_as}, as the annotation of its first argument asks for, and has "
                    "no gradient there, which fine-tuning would follow here; use an estimator of the gradient that "
                    "needs none of the reward, or write it for torch.Tensor, with torch operations throughout"
                )
            if not reward.requires_grad:  # before the dtype: integers would not have a gradient in another one either
                raise NoGradientError(
                    "reward is not differentiable, and its gradient was to be followed: its result does not depend on "
                    f"the samples through torch operations; {BY_TORCH}, and without integers and comparisons; or "
                    f"{NEEDS_NO_SLOPE}"
                )
            _check_dtype(reward, x)
            gradient = torch.autograd.grad(reward.sum(), x, allow_unused=True, retain_graph=True)[0]
            if gradient is None:
                raise NoGradientError(
                    f"reward is not differentiable: its result does not depend on the samples; {BY_TORCH}; or "
                    f"{NEEDS_NO_SLOPE}"
                )
            of_first = torch.autograd.grad(reward[0], x)[0]
        _check_finite("a gradient", gradient)
        check_own_gradient("reward", of_first)
        check_slope("reward", gradient, reward.detach(), warn=not self.checked)

    def check_stationary(self, particles: Particles, energy: Float[Tensor, " n"]) -> None:
        """Try the reward on the initial particles; one that is the same at all of them causes a warning.

        Raises:
            InvalidInputError: another shape than (n,), another dtype, NaN or infinity, or samples that influence each
                other's rewards.
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

        A reward that gives the same samples other values at a second call causes a warning.

        Raises:
            InvalidInputError: samples that influence each other's rewards; not one number per sample.
            NonFiniteError: NaN or infinity.
        """
        few = _chosen(particles, slice(TRIED))
        with self.evaluating():
            values = self.finite_values(_chosen(few, slice(None)))
            check_separate("reward", lambda index: self.finite_values(_chosen(few, index)), values)

    def _numbers(self, particles: Particles) -> Float[Tensor, " n"]:
        reward = self.of(particles)
        return reward if reward.is_floating_point() else reward.to(particles.x.dtype)


def as_reward(reward: Callable[..., Any] | Reward) -> Reward:
    """A `Reward` as it is; a function as a `Reward`."""
    return reward if isinstance(reward, Reward) else Reward(reward)


def _chosen(particles: Particles, index: Tensor | slice) -> Particles:
    """Copies of some samples and of their conditions, since a black box may write into them."""
    given = particles.condition
    condition = None if given is None else {name: value[index].clone() for name, value in given.items()}
    return Particles(particles.x.detach()[index].clone(), condition=condition)


def _check_dtype(reward: Tensor, x: Tensor) -> None:
    if reward.dtype != x.dtype:
        raise InvalidInputError(
            f"reward must return the dtype of the samples, {x.dtype}, got {reward.dtype}; end it with .to(x.dtype)"
        )


def check_values(what: str, reward: Float[Tensor, " n"]) -> None:
    """Raise `NonFiniteError` where some rewards are NaN or infinite."""
    if not reward.isfinite().all():
        bad = int((~reward.isfinite()).sum())
        raise NonFiniteError(f"{what} of {bad} of {len(reward)} samples is NaN or infinite")


def _check_finite(what: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise InvalidInputError(
            f"reward gives {what} that are NaN or infinite on samples of the initial model; they must be finite"
        )
