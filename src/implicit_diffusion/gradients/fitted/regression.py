"""R̂ fitted by regression to pairs (x_N, R) of earlier trajectories, and what it explains of later ones.

Every batch of pairs is first predicted, then learned:

    measure   the batch is new to R̂: what R̂ says of it is a test
    add       its pairs replace the oldest in a buffer that is bounded, in pairs and in bytes
    fit       a fixed number of Adam's steps on the squared error of pairs drawn from the buffer by key

Rewards are standardised by those in the buffer, so that R̂ = mean + deviation · network.

**The share that is used.** A surrogate writes R = α R̂ + (R − α R̂), and any α fixed in advance leaves the gradient
unbiased. Let r and p be R and R̂ less their means over the other samples of a batch. The rest has the least variance at
the regression coefficient S_rp/S_pp, from sums over earlier batches in which the past fades. Known from n pairs, it has
the squared standard error e² = (S_rr/S_pp − (S_rp/S_pp)²)/n, by which it is shrunk (James and Stein):

    α = (S_rp/S_pp) · max(0, 1 − e² (S_pp/S_rp)²), at most 1, and 0 where S_rp ≤ 0

An R̂ that predicts nothing, or the opposite, is not used, and the surrogate is the score function. One that has just
begun is used as far as it has proved itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.frozen import eval_mode, load_trained_state, trained_state
from implicit_diffusion.gradients.fitted.network import RewardNetwork, predicted, seen
from implicit_diffusion.gradients.score_function import groups, leave_one_out
from implicit_diffusion.noise import Noise

MEMORY = 256  # pairs over which what was measured fades
MINIBATCH = 64  # pairs of one step
MOST = 64_000_000  # bytes of the pairs that are kept, in memory and in every checkpoint

Condition = Mapping[str, Tensor] | None


class Regression:
    """R̂ with its optimizer, its pairs, and what it has explained.

    Args:
        network: from (n, *event) to (n,), trained in place.
        noise: of the pairs that a step draws.
        pairs: that are kept, the last ones seen; see `capacity`.
        steps: of Adam for each batch of new pairs.
        learning_rate: of Adam.
    """

    def __init__(self, network: nn.Module, noise: Noise, *, pairs: int, steps: int, learning_rate: float) -> None:
        self.network, self.noise, self.steps = network, noise, steps
        self.pairs = pairs  # until the first ones say how large they are
        self.weights = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.weights, lr=learning_rate)
        self.buffer: dict[str, Tensor] = {}  # "x", "rewards" and the entries of the condition, each (pairs, ...)
        self.seen = 0  # pairs so far
        self.fits = 0
        self.measured = torch.zeros(4, dtype=torch.float64)  # n, S_rr, S_rp, S_pp

    def __call__(self, x: Float[Tensor, "n *event"], condition: Condition) -> Float[Tensor, " n"]:
        """R̂, differentiable in x; zero before there are pairs."""
        if not self.fits:
            return 0 * x.flatten(1).sum(1)
        mean, deviation = self._scale()
        with eval_mode(self.network):
            return mean + deviation * predicted(self.network, x, condition)

    @property
    def share(self) -> float:
        """α."""
        n, rr, rp, pp = self.measured.tolist()
        return min(1.0, rp / pp * max(0.0, 1 - (rr * pp / rp**2 - 1) / n)) if rp > 0 else 0.0

    @property
    def explained(self) -> float:
        """The share of the rewards' variance within a batch that α R̂ explained before it had seen them."""
        _, rr, rp, pp = self.measured.tolist()
        return self.share * (2 * rp - self.share * pp) / rr if rr > 0 else 0.0

    def learn(self, x: Float[Tensor, "n *event"], rewards: Float[Tensor, " n"], condition: Condition) -> None:
        """Measure R̂ on pairs that it has not seen, then fit it to these as well."""
        with torch.no_grad():
            if self.fits:
                self._measure(self(x, condition), rewards, groups(condition))
            self._add({"x": x, "rewards": rewards} | _prefixed(seen(self.network, condition)))
        self._fit()

    def _measure(self, prediction: Tensor, rewards: Tensor, group: Tensor | None) -> None:
        n, both = len(rewards), torch.stack([rewards, prediction]).double()
        if n == 1:  # there are no others, but earlier ones
            both = both - self._scale()[0].double()
        r, p = leave_one_out(both, None if group is None else group.expand(2, n))
        self.measured *= max(0.0, 1 - n / MEMORY)
        self.measured += torch.stack([r.new_tensor(n), r @ r, r @ p, p @ p]).cpu()

    def _add(self, pairs: Mapping[str, Tensor]) -> None:
        """Write pairs over the oldest ones."""
        n = len(pairs["x"])
        if not self.buffer:
            self.pairs = capacity(self.pairs, sum(new[:1].nbytes for new in pairs.values()))
        places = torch.arange(self.seen, self.seen + n, device=pairs["x"].device)[-self.pairs :] % self.pairs
        for name, new in pairs.items():
            if name not in self.buffer:
                self.buffer[name] = new.new_zeros(self.pairs, *new.shape[1:])
            self.buffer[name][places] = new[-self.pairs :]
        self.seen += n

    def _fit(self) -> None:
        held = self._held()
        if not self.fits and isinstance(self.network, RewardNetwork):
            self.network.standardise(held["x"])
        mean, deviation = self._scale()
        generator = self.noise.generator(self.fits)
        with torch.enable_grad(), eval_mode(self.network):
            for _ in range(self.steps):
                chosen = torch.randint(len(held["x"]), (MINIBATCH,), generator=generator).to(held["x"].device)
                pair = {name: part[chosen] for name, part in held.items()}
                error = predicted(self.network, pair["x"], _condition(pair)) - (pair["rewards"] - mean) / deviation
                gradients = torch.autograd.grad(error.square().mean(), self.weights, allow_unused=True)
                for p, gradient in zip(self.weights, gradients, strict=True):
                    p.grad = gradient
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.fits += 1

    def _held(self) -> dict[str, Tensor]:
        """The part of the buffer that holds pairs."""
        return {name: part[: self.seen] for name, part in self.buffer.items()}

    def _scale(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the rewards in the buffer."""
        deviation, mean = torch.std_mean(self._held()["rewards"], correction=0)
        return mean, torch.where(deviation > 0, deviation, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """All that the next prediction and the next fit depend on."""
        return {
            "network": trained_state(self.network),
            "optimizer": self.optimizer.state_dict(),
            "pairs": self._held(),
            "seen": self.seen,
            "fits": self.fits,
            "measured": self.measured.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        load_trained_state(self.network, state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        device = self.weights[0].device
        self.buffer, self.seen = {}, 0
        if state["seen"]:
            self._add({name: part.to(device) for name, part in state["pairs"].items()})
        self.seen, self.fits, self.measured = state["seen"], state["fits"], state["measured"].clone()


def capacity(pairs: int, bytes_each: int) -> int:
    """The number of pairs that are kept of so many that are wished for: `MOST` bytes of them, but enough for a step."""
    return min(pairs, max(MINIBATCH, MOST // bytes_each))


CONDITION = "condition."  # before the names of a condition's entries in the buffer


def _prefixed(condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {CONDITION + name: entry for name, entry in condition.items()}


def _condition(pairs: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    inside = {name.removeprefix(CONDITION): p for name, p in pairs.items() if name.startswith(CONDITION)}
    return inside or None
