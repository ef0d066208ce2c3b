"""What is trained for: four problems, each a chain, a reward, and a KL weight of one deviation of the reward.

"gaussian" has its exact gradient in closed form. The exact gradient of "brightness" is the mean of the adjoint's over
many trajectories. That of "brightness-rounded" is the same: rounding to a grid changes the mean of a smooth law of
deviation σ (in units of the grid) by a factor e^{−2π²σ²} of a period (Poisson's summation formula), and the brightness
of the digits has σ = 2.6. The size of a JPEG file has no gradient to compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.commands.compare.affine import QuadraticReward, affine_problem, clean, exact_objective
from implicit_diffusion.commands.rewards.names import load_reward
from implicit_diffusion.denoisers.gaussian import DiscreteMarginal
from implicit_diffusion.evaluation.bounds import Bound, bound
from implicit_diffusion.evaluation.chains import Estimate, evaluate, mean_and_error
from implicit_diffusion.frozen import copied
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective, PathKL, Reward
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown
from implicit_diffusion.tables.named import scheduler_for, table_for

DIFFERENTIABLE = ("gaussian", "brightness")  # the problems whose rewards have a gradient
PLAN = 0  # stream of the noise of the bound
REPEATS = 16  # trajectories from each start, for the bound
PAIRS = 128  # pretrained samples with their rewards, for what learns from them

Function = Callable[[Tensor], Tensor]
Clean = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rounded:
    """A reward to whole numbers."""

    reward: Function

    def __call__(self, x: Float[Tensor, "n *event"]) -> Float[Tensor, " n"]:
        return self.reward(x).round()


@dataclass(frozen=True, repr=False)
class Problem(Shown):
    """One problem.

    Args:
        name: of it.
        pretrained: the chain before training.
        reward: R, of samples.
        smooth: a reward whose expectation has the same gradient, and which has a gradient itself; None where there is
            none. It is R itself where R is differentiable.
        clean: (x, u, t) ↦ the prediction of x_N from a state and the network's output.
        rate: learning rate that searches begin with.
        many: how many times as many gradients are measured as are asked for, since those of a tiny network cost little.
        deviation: of the pretrained reward.
        pairs: pretrained samples and their rewards.
        before: J of the pretrained chain, −E R.
        best: the bound J* at the KL weight.
    """

    name: str
    pretrained: Chain
    reward: Function
    smooth: Function | None
    clean: Clean
    rate: float
    many: int
    deviation: float
    pairs: tuple[Tensor, Tensor]
    before: Estimate
    best: Bound

    @property
    def beta(self) -> float:
        """The KL weight: the deviation of the pretrained reward, per nat."""
        return self.deviation

    def chain(self) -> Chain:
        """The chain with a network of its own, to be trained."""
        return self.pretrained.replace(denoiser=copied(network_of(self.pretrained)))

    def objective(self, reward: Function | None = None) -> Objective:
        """F = −E R + β KL(path), of its own reward or of another."""
        return Reward(reward or self.reward, checked=True) + self.beta * PathKL()

    def exact(self, chain: Chain) -> Float[Tensor, " parameters"] | None:
        """∇J at the chain's parameters where it is a closed form; None otherwise."""
        if not isinstance(self.reward, QuadraticReward):
            return None
        parameters = list(network_of(chain).parameters())
        gradients = torch.autograd.grad(exact_objective(chain, self.reward, self.beta), parameters)
        return torch.cat([g.flatten() for g in gradients])


def network_of(chain: Chain) -> nn.Module:
    """The denoiser of a problem's chain, which is a module."""
    assert isinstance(chain.denoiser, nn.Module)
    return chain.denoiser


def build(name: str, num_steps: int, starts: int, noise: Noise) -> Problem:
    """A problem by its name; samples its pretrained chain for β, J and J*.

    Args:
        name: one of `config.PROBLEMS`.
        num_steps: N.
        starts: number of initial noises, with `REPEATS` trajectories each.
        noise: its stream `PLAN` is used.
    """
    reward: Function
    smooth: Function | None
    predict: Clean
    if name == "gaussian":
        chain, quadratic = affine_problem(num_steps)
        reward, smooth, predict, rate, many = quadratic, quadratic, clean, 0.03, 16
    else:
        chain, predict = _digits(num_steps)
        rate, many = 1e-4, 1
        reward = smooth = load_reward(name.removesuffix("-rounded"))
        if name == "brightness-rounded":
            reward = Rounded(smooth)
        if name == "jpeg-size":
            smooth = None
    pretrained = evaluate(chain.pretrained(), reward, noise.stream(PLAN), starts=starts, repeats=REPEATS)
    deviation = pretrained.reward.std().item()
    before = mean_and_error(-pretrained.reward)
    pairs = pretrained.samples.flatten(0, 1)[:PAIRS], pretrained.reward.flatten()[:PAIRS]
    return Problem(
        name, chain, reward, smooth, predict, rate, many, deviation, pairs, before, bound(pretrained, deviation)
    )


def _digits(num_steps: int) -> tuple[Chain, Clean]:
    """The shipped model under DDPM, and the clean sample that it predicts, α x − σ v."""
    model = load_pretrained("digits")
    torch.nn.utils.convert_conv2d_weight_memory_format(model.denoiser, torch.channels_last)
    table = table_for(scheduler_for(model.scheduler, "ddpm", clip=False), "ddpm", num_steps)
    marginal = DiscreteMarginal(model.scheduler.alphas_cumprod)

    def predict(x: Tensor, u: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c.to(x).view(-1, 1, 1, 1) for c in marginal(t))
        return alpha * x - sigma * u

    return Chain(model.denoiser, table, model.event_shape, pretrained_rows="noiseless"), predict
