"""The surrogate: the adjoint on a differentiable R̂, and the score function on what R̂ leaves of the reward.

For any function R̂ and any number α that do not depend on the batch,

    ∇ E R = ∇ E[α R̂]  +  ∇ E[R − α R̂]
            adjoint       score function

so that Γ is unbiased for *every* fixed R̂. A good one moves the variance from the score function, which knows no more of
a reward than its value, to the adjoint, which follows a slope. Written as one scalar per row, with A the rest
−(R − α R̂) less its mean over the other samples, ρ_k the ratio of the present density of x_{k+1} to the one that it was
drawn from, and the running costs c_k differentiated as they are,

    λ_N = −α ∇R̂(x_N)/B
    S_k = ⟨b_k λ_{k+1}, u_θ(m_k x_k, t_k)⟩ + (1/B) Σ_i c_k(x_k,i, θ),      T_k = (1/B) Σ_i ρ_k,i A_i
    Γ += ∇_θ (S_k + T_k),       λ_k = a_k λ_{k+1} + ∇_{x_k} S_k

The score function holds the states fixed: T_k has no part in λ. One call of the network serves both. Its graph is gone
through once for ∇_{x_k} T_k, which is subtracted, and once for everything.

R̂ is a regression on pairs (x_N, R) of *earlier* trajectories (`gradients.fitted.regression`): a batch turns round
under the R̂ of those before it, its λ_N and A are fixed there, and only then is it learned. An R̂ fitted to its own batch
would know that batch's rewards by heart, and A would be missing from Γ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError, check_integer, check_number, check_tensor, check_type, shown
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.gradients.adjoint import pull_back
from implicit_diffusion.gradients.estimator import Carry, Pulled, RowEstimator, RowStates
from implicit_diffusion.gradients.fitted.network import RewardNetwork, check_network, predicted, seen
from implicit_diffusion.gradients.fitted.regression import MINIBATCH, Regression, capacity
from implicit_diffusion.gradients.footprint import (
    Footprint,
    bytes_of,
    row_activations,
    saved_per_sample,
    variation_activations,
)
from implicit_diffusion.gradients.score_function import (
    check_noise,
    clipped_objective,
    groups,
    leave_one_out,
    log_ratio,
    terminal_costs,
)
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers.chain import TRIAL, Chain
from implicit_diffusion.tables.transition import Transition

CHUNK = 16  # pairs that are predicted together before they are learned, where many come at once


class Surrogate(RowEstimator):
    """∇ℓ for any reward: the adjoint on a network fitted to the reward, and the score function on the rest.

    It begins as the score function, and gets better as R̂ does; `learn` gives it pairs that have been paid for already.
    What R̂ sees are the states of the chain: latents where the model is latent, so that no decoder is differentiated.

        surrogate = Surrogate()
        surrogate.learn(samples, rewards)  # of the pretrained chain
        objective = Reward(black_box) + 0.1 * PathKL()
        loop = Queue(chain, objective, optimizer, batch=16, noise=Noise(0), estimator=surrogate)

    Args:
        network: R̂, from samples of shape (n, *event) to (n,) or (n, 1), trained in place. If it has two arguments, the
            second is the condition, as for a `Reward`. If None, a small network of the surrogate's own: a perceptron
            for vectors, convolutions for images, with a row of weights for every class label or prompt number.
        clip: ε: ratios ρ that have left [1 − ε, 1 + ε] to an action's advantage bring no gradient; None to keep all.
        pairs: that are remembered, the last ones seen, with what R̂ looks at of their condition. Where they are large
            these are fewer, so that they take at most 64 MB in memory and in every checkpoint, but no fewer than a step
            of Adam draws.
        steps: of Adam per batch that turns round.
        learning_rate: of Adam.
        noise: of R̂'s first weights, and of the pairs that a step draws; `Noise(0)` if None.

    Raises:
        InvalidInputError: a network that is not a module; a number out of bounds.
    """

    parts: ClassVar[Mapping[str, str]] = {"adjoint": "adjoints λ", "advantage": "advantages A", "after": "states x"}

    def __init__(
        self,
        network: nn.Module | None = None,
        *,
        clip: float | None = 0.2,
        pairs: int = 4096,
        steps: int = 10,
        learning_rate: float = 1e-3,
        noise: Noise | None = None,
    ) -> None:
        if network is not None:
            check_type(
                "network", network, nn.Module, "use a module from (n, *event) to (n,), or None for one that fits"
            )
        self.clip = None if clip is None else check_number("clip", clip, 0, 1, note=", or None")
        self.pairs, self.steps = check_integer("pairs", pairs, 2), check_integer("steps", steps)
        self.learning_rate = check_number("learning_rate", learning_rate, 0, 1)
        self.noise = Noise(0) if noise is None else noise
        check_type("noise", self.noise, Noise, "use Noise(0), for example")
        self.network = network
        self.regression: Regression | None = None  # once the event shape is known
        self.kind: str | None = None  # of the samples, in words

    @property
    def name(self) -> str:
        return f"Surrogate({', '.join(self._words())})"

    def _words(self) -> Iterable[str]:
        network = "its own" if self.network is None else type(self.network).__name__
        yield f"network={network}"
        yield from (f"{name}={getattr(self, name)}" for name in ("clip", "pairs", "steps", "learning_rate", "noise"))

    def check(self, chain: Chain, objective: Objective, end: Particles) -> None:
        """Raise `InvalidInputError` where a trained row has no noise, or where R̂ cannot be trained on such samples."""
        check_noise(chain, "Surrogate")
        self._checked(end.x, end.condition)

    def learn(
        self,
        x: Float[Tensor, "n *event"],
        rewards: Float[Tensor, " n"],
        condition: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Fit R̂ to samples whose rewards are known: those of earlier trajectories, in a random order.

        Args:
            x: states x_N of the chain.
            rewards: Σ_j w_j R_j, as the objective weighs its rewards.
            condition: what they were sampled under, tensors with leading dimension n by name.

        Raises:
            InvalidInputError: numbers that are not finite, shapes that do not fit together or to what has been learned
                before, or samples that R̂ cannot be trained on.
        """
        check_tensor("x", x, "n *event", finite=True)
        check_tensor("rewards", rewards, "n", finite=True)
        if condition is not None:
            check_type("condition", condition, Mapping, "it maps names to tensors with leading dimension n")
        entries = {} if condition is None else {str(name): entry for name, entry in condition.items()}
        for name, entry in {"rewards": rewards, **entries}.items():
            if not isinstance(entry, Tensor) or entry.shape[:1] != x.shape[:1]:
                raise InvalidInputError(f"{name} must have one entry for each of {len(x)} samples, got {shown(entry)}")
        regression = self._checked(x, entries or None)
        for first in range(0, len(x), CHUNK):
            part = slice(first, first + CHUNK)
            given = {name: entry[part] for name, entry in entries.items()} or None
            regression.learn(x[part].detach(), rewards[part].detach().to(x), given)

    def turn(self, objective: Objective, end: Particles) -> tuple[Carry, dict[str, Float[Tensor, ""]]]:
        """λ_N of α R̂ and the advantage A of the rest, under the R̂ of earlier trajectories; then R̂ learns this one too.

        Every process sees the whole batch here, and fits the same.
        """
        costs, values = terminal_costs(objective, end)
        whole, rewards = end.whole(), -processes.gathered(costs)
        regression, batch = self.regression or self._checked(whole.x, whole.condition), len(rewards)
        with processes.alone(), torch.enable_grad():
            x = whole.x.detach().requires_grad_()
            guess = regression(x, whole.condition)
            (slope,) = torch.autograd.grad(guess.sum(), x)
            rest = regression.share * guess.detach() - rewards
            group = groups(whole.condition)
            advantage = leave_one_out(rest[None], None if group is None else group[None])[0]
            adjoint = -regression.share * slope / batch
            if rewards.isfinite().all():  # where they are not, the loop stops
                regression.learn(whole.x, rewards, whole.condition)
        carry = {"adjoint": processes.share(adjoint), "advantage": processes.share(advantage / batch)}
        return {**carry, "after": end.x}, values

    def pull(self, chain: Chain, objective: Objective, at: RowStates, carry: Carry) -> Pulled:
        """λ_k from λ_{k+1}, with the score function's part of Γ; see `pull_back`."""
        xi, measured = at.innovation(chain), {}

        def score(transition: Transition) -> Tensor:
            log_rho = log_ratio(transition, carry["after"], xi)
            ratio_times_advantage, clipped = clipped_objective(log_rho, carry["advantage"], self.clip)
            trained = transition.trained.flatten()
            measured["clipped"] = clipped.to(at.x.dtype).mean(1)
            measured["surrogate_explained"] = trained * at.x.new_tensor(self.explained)
            return ratio_times_advantage.sum()

        trains = not chain.pretrained_rows.issuperset(at.rows)
        adjoint, costs, evaluations = pull_back(
            chain, objective, at.x, at.rows, carry["adjoint"], at.condition, score if trains else None
        )
        return Pulled({**carry, "adjoint": adjoint, "after": at.x}, costs, evaluations, measured)

    @property
    def explained(self) -> float:
        """The share of the variance of the rewards that R̂ explained, as far as it is used, on pairs new to it."""
        return 0.0 if self.regression is None else self.regression.explained

    def memory(self, chain: Chain, objective: Objective, noise: Noise) -> Footprint:
        """An adjoint, a state and an advantage per sample, the activations of a single row, and R̂ with its pairs."""
        row, recomputed = row_activations(chain, objective, noise)
        network = self.network or self._own(chain.event_shape).to(chain.device, chain.dtype)

        def samples(n: int) -> Particles:
            x = torch.zeros(n, *chain.event_shape, device=chain.device, dtype=chain.dtype, requires_grad=True)
            return chain.endpoint(x, noise, TRIAL)

        def end(n: int) -> object:
            return predicted(network, (few := samples(n)).x, few.condition)

        with eval_mode(network):
            activations, _ = saved_per_sample(end)
        event, number = bytes_of(chain.event_shape, chain.dtype), bytes_of((), chain.dtype)
        looked_at = seen(network, samples(2).condition).values()
        pair = event + number + sum(entry[:1].nbytes for entry in looked_at)
        weights = sum(p.nbytes * (4 if p.requires_grad else 1) for p in network.parameters())  # gradient, two moments
        return Footprint(
            carry=2 * event + number,
            turn=variation_activations(chain, objective, noise) + processes.world_size() * (event + activations),
            pull=row + recomputed,
            kept=weights + capacity(self.pairs, pair) * pair + MINIBATCH * activations,
        )

    def state_dict(self) -> dict[str, Any]:
        """R̂, its optimizer, its pairs and what it has explained; empty where nothing is known of the samples yet."""
        if self.regression is None:
            return {}
        return {"event_shape": list(self.event_shape)} | self.regression.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        if not state:
            self.regression = None
            return
        first = next(iter(state["network"].values()))
        self._begun(first.new_empty(0, *state["event_shape"])).load_state_dict(state)

    def _own(self, event_shape: Sequence[int]) -> RewardNetwork:
        return RewardNetwork(event_shape, self.noise.stream(0))

    def _checked(self, x: Float[Tensor, "n *event"], condition: Mapping[str, Tensor] | None) -> Regression:
        """The regression, if it can be trained on samples of this kind, under such a condition."""
        given = kind_of(x, condition)
        if self.kind not in (None, given):
            raise InvalidInputError(
                f"the surrogate was begun with {self.kind}, and now there are {given}; make a new one for these"
            )
        if self.network is not None:
            few = None if condition is None else {name: entry[:2] for name, entry in condition.items()}
            check_network(self.network, x[:2], few)
        self.kind = given
        return self._begun(x)

    def _begun(self, x: Float[Tensor, "n *event"]) -> Regression:
        """The regression on samples of this kind, built when the first are seen."""
        if self.regression is None:
            self.event_shape = tuple(x.shape[1:])
            network = self.network or self._own(self.event_shape).to(x.device, x.dtype)
            self.regression = Regression(
                network,
                self.noise.stream(1),
                pairs=self.pairs,
                steps=self.steps,
                learning_rate=self.learning_rate,
            )
        return self.regression


def kind_of(x: Float[Tensor, "n *event"], condition: Mapping[str, Tensor] | None) -> str:
    """Shapes, precision and device of samples and of their condition, in words."""
    words = f"samples of shape {tuple(x.shape[1:])} in {x.dtype} on {x.device}"
    entries = [f"{name} of shape {tuple(entry.shape[1:])}" for name, entry in sorted((condition or {}).items())]
    return f"{words} under {', '.join(entries)}" if entries else words
