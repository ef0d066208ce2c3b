"""The queue on the chain that denoises a one-dimensional Gaussian, and its closed form.

The reversed Ornstein–Uhlenbeck process with the score −(x − e^{−t}θ), N steps of length h = T/N, is a linear recursion
with the output x_N = Gθ + ζ, ζ ~ N(0, v). For the reward −(x − m)²/2, ∇ℓ = G (Gθ − m), and the optimum is θ* = m/G.
With ρ = 1 − h, what θ adds on the j-th row from the end and the constants are

    g_j = 2h ρ^{j−1} e^{−jh},      G = Σ_j g_j,      v = ρ^{2N} + (1 − ρ^{2N})/(1 − h/2).

In the queue trajectory i runs its row k in iteration i + k, arrives with x̄_i = Σ_j g_j θ^{(i+N−j)} + ζ̄_i, and its j-th
row from the end is pulled back j − 1 iterations later. So with Γ_n = Σ_j g_j (x̄_{n+2−N−j} − m), where the sum is over
the trajectories that there are,

    θ^{(n+1)} = θ^{(n)} − η Γ_n

is a linear recursion with a delay: its mean, what one ζ̄_i does to all later θ (hence the variance of θ), and the rate
at which it settles, the largest root of z^{2N−1} = z^{2N−2} − η Σ_d c_d z^{2N−2−d} with c = g ∗ g, are all exact.
Nested settles at the rate 1 − ηG². docs/mathematics/ou-gaussian.md derives this, and that ηG² + (2τηG²)² ≤ 1 suffices
for the mean to converge, τ = Σ_j (j − 1) g_j/G.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.denoisers.gaussian import GaussianDenoiser
from implicit_diffusion.loops import Queue
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables import ou_reverse_sde

HORIZON, TARGET, START = 1.5, 2.0, -0.5  # T, m and θ_0
FALLEN = 0.05  # share of the initial error at which the rate is read off
LEFT = 1e-3  # share of it that is left when θ counts as settled
BATCH = 24  # trajectories that are injected per iteration


@dataclass(frozen=True)
class Denoising:
    """The problem with N steps, and its queue under plain gradient steps.

    Args:
        num_steps: N.
        pace: p = ηG², the share of the error that a nested step would remove.
    """

    num_steps: int
    pace: float

    @property
    def h(self) -> float:
        """T/N."""
        return HORIZON / self.num_steps

    @property
    def g(self) -> Float[Tensor, " rows"]:
        """g_1, …, g_N."""
        j = torch.arange(1, self.num_steps + 1, dtype=torch.float64)
        return 2 * self.h * (1 - self.h) ** (j - 1) * torch.exp(-j * self.h)

    @property
    def gain(self) -> float:
        """G."""
        return self.g.sum().item()

    @property
    def variance(self) -> float:
        """v, of an output."""
        forgotten = (1 - self.h) ** (2 * self.num_steps)
        return forgotten + (1 - forgotten) / (1 - self.h / 2)

    @property
    def lr(self) -> float:
        """η."""
        return self.pace / self.gain**2

    @property
    def optimum(self) -> float:
        """θ* = m/G."""
        return TARGET / self.gain

    @property
    def age(self) -> float:
        """τ, in iterations: half of the mean age of the θ in Γ."""
        return (torch.arange(self.num_steps, dtype=torch.float64) @ self.g).item() / self.gain

    @property
    def guaranteed(self) -> bool:
        """Whether the sufficient condition for the mean to converge holds."""
        return self.pace + (2 * self.age * self.pace) ** 2 <= 1

    @property
    def rate(self) -> float:
        """The largest |root|: by how much the mean error shrinks per iteration in the end."""
        g = self.g
        c = torch.nn.functional.conv1d(g.view(1, 1, -1), g.flip(0).view(1, 1, -1), padding=len(g) - 1).flatten()
        companion = torch.diag(torch.ones(len(c) - 1, dtype=torch.float64), -1)
        companion[0] = -self.lr * c
        companion[0, 0] += 1
        return torch.linalg.eigvals(companion).abs().max().item()

    def path(self, iterations: int, start: float = START, first_noise: float = 0.0) -> Float[Tensor, " times"]:
        """θ^{(n)} for 0 ≤ n ≤ iterations, of the recursion without noise but ζ̄_0 = `first_noise`.

        Args:
            iterations: of the queue.
            start: θ^{(0)}.
            first_noise: what the noise adds to the output of the first trajectory.
        """
        N, g = self.num_steps, self.g
        theta = torch.full((iterations + 1,), start, dtype=torch.float64)
        misses = torch.zeros(iterations + 1, dtype=torch.float64)  # x̄_i − m
        for n in range(iterations):
            theta[n + 1] = theta[n]
            i = n - (N - 1)  # the trajectory that arrives in this iteration
            if i >= 0:
                misses[i] = g.flip(0) @ theta[i : i + N] + (first_noise if i == 0 else 0.0) - TARGET
                pulled = min(N, i + 1)
                theta[n + 1] -= self.lr * (g[:pulled] @ misses[i + 1 - pulled : i + 1].flip(0))
        return theta

    def settled_variance(self, batch: int) -> float:
        """The variance of θ in the end, with `batch` trajectories per iteration: v/batch Σ_k response_k²."""
        long = math.ceil(30 / self.pace) + 10 * self.num_steps
        response = self.path(long, self.optimum, first_noise=1.0) - self.optimum
        return self.variance / batch * response.square().sum().item()

    @property
    def window(self) -> tuple[int, int]:
        """Iterations between which the rate is read off: a full queue, and the mean error at a twentieth."""
        first, errors = 2 * self.num_steps, self.path(math.ceil(10 / self.pace) + 4 * self.num_steps) - self.optimum
        below = (errors[first:].abs() < FALLEN * abs(errors[0].item())).nonzero()
        return first, first + max(1, int(below[0]))


@dataclass(frozen=True)
class QueueResult:
    """One run of the queue, copies of the problem at once; errors are over copies.

    Args:
        num_steps: N.
        lr: η.
        pace: ηG².
        guaranteed: whether ηG² + (2τηG²)² ≤ 1.
        staleness: the largest age of a contribution, 2N − 2 updates.
        rate: by how much the mean error of θ shrank per iteration, between a full queue and a twentieth of the error.
        rate_se: its standard error.
        rate_exact: the same of the recursion.
        rate_nested: 1 − ηG².
        output: mean of x_N under the final θ, Gθ.
        output_se: its standard error.
        target: m, to which the paper's analysis of this problem says that it converges.
        variance: of θ in the end.
        variance_se: its standard error.
        variance_exact: the same of the recursion.
    """

    num_steps: int
    lr: float
    pace: float
    guaranteed: bool
    staleness: int
    rate: float
    rate_se: float
    rate_exact: float
    rate_nested: float
    output: float
    output_se: float
    target: float
    variance: float
    variance_se: float
    variance_exact: float


def run_queue(
    problem: Denoising, copies: int, longest: int, seed: int
) -> tuple[QueueResult, Float[Tensor, "times copies"]]:
    """Run the queue until it has settled and as long again; returns its numbers, and θ^{(n)} of every copy.

    Args:
        problem: N and η.
        copies: of the problem: coordinates of one event, whose gradients do not mix.
        longest: iterations, at most.
        seed: of the noise.
    """
    first, last = problem.window
    settled = min(first + math.ceil(math.log(LEFT) / math.log(problem.rate)), longest // 2)
    iterations = max(min(settled + max(200, math.ceil(5 / problem.pace)), longest), last + 1)
    theta = torch.full((copies,), START, dtype=torch.float64)
    denoiser = GaussianDenoiser.ornstein_uhlenbeck(theta, 1.0)
    chain = Chain(denoiser, ou_reverse_sde(problem.num_steps, HORIZON), (copies,))
    loop = Queue(
        chain,
        Reward(lambda x: -(x - TARGET).square().sum(1) / 2),
        torch.optim.SGD(denoiser.parameters(), lr=problem.lr),
        batch=BATCH,
        noise=Noise(seed),
    )
    path = theta.new_empty(iterations + 1, copies)
    path[0] = theta
    for n in range(iterations):
        loop.step()
        path[n + 1] = denoiser.mean.detach()
    return _summarise(problem, path, first, last, settled), path


def _summarise(
    problem: Denoising, path: Float[Tensor, "times copies"], first: int, last: int, settled: int
) -> QueueResult:
    errors, root_copies = path - problem.optimum, math.sqrt(path.shape[1])
    shrunk, rate_error = _rate(errors[first], errors[last], last - first)
    expected = problem.path(last) - problem.optimum
    end = errors[settled:]
    squares, output = end.square().mean(0), problem.gain * path[settled:].mean(0)
    return QueueResult(
        num_steps=problem.num_steps,
        lr=problem.lr,
        pace=problem.pace,
        guaranteed=problem.guaranteed,
        staleness=2 * problem.num_steps - 2,
        rate=shrunk,
        rate_se=rate_error,
        rate_exact=(expected[last] / expected[first]).abs().item() ** (1 / (last - first)),
        rate_nested=1 - problem.pace,
        output=output.mean().item(),
        output_se=output.std().item() / root_copies,
        target=TARGET,
        variance=squares.mean().item(),
        variance_se=squares.std().item() / root_copies,
        variance_exact=problem.settled_variance(BATCH),
    )


def _rate(before: Float[Tensor, " copies"], after: Float[Tensor, " copies"], iterations: int) -> tuple[float, float]:
    """|mean after/mean before|^{1/iterations}, and its standard error by the delta method."""
    rate = (after.mean() / before.mean()).abs().item() ** (1 / iterations)
    relative = after / after.mean() - before / before.mean()
    return rate, rate / iterations * relative.std().item() / math.sqrt(len(before))
