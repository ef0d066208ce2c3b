r"""The score function: a gradient of any reward, black boxes included, on chains whose rows have noise.

The row's law is the Gaussian p_θ(x_{k+1}|x_k) = N(mean_θ, s_k² I), mean_θ = a_k x_k + b_k u_θ(m_k x_k, t_k). What noise
decides at x_{k+1} can change what is paid after it alone, the cost to go

    G_k = F′(x_N) + β Σ_{j>k} c_j        (F′ = −R for a reward, β c_j the weighted running costs)

and, since E ∇_θ log p_θ(x_{k+1}|x_k) = 0 given x_k, any b that does not depend on x_{k+1} may be subtracted from it:

    ∇ℓ = E Σ_k ∇_θ log p_θ(x_{k+1}|x_k) (G_k − b) + β E Σ_k ∇_θ c_k(x_k, θ)         with the states held fixed

(REINFORCE: Williams, *Simple statistical gradient-following algorithms*, 1992. On denoising chains: Black et al.,
*Training Diffusion Models with Reinforcement Learning*, arXiv 2305.13301; Fan et al., arXiv 2305.16381.)

*Baseline.* b is the mean of G_k over the other samples of the same condition (the same prompt or class), or over all
other samples of the batch where a sample is the only one of its condition: a mean that includes the sample itself would
bias Γ. (Kool, van Hoof and Welling, *Buy 4 REINFORCE samples, get a baseline for free*, 2019.)

*Ratio.* In a queue θ moves between the draw of x_{k+1} and the call with gradient. The noise is replayed by key, so
mean_old = x_{k+1} − s_k ξ_k is known exactly, and with D = mean_θ − mean_old

    ρ_k = p_θ(x_{k+1}|x_k) / p_old(x_{k+1}|x_k) = exp(⟨D, ξ_k⟩/s_k − ‖D‖²/(2 s_k²)),       ∇ρ_k = ρ_k ∇ log p_θ,

so that ∇ρ_k (G_k − b) corrects the row's own action; the law of x_k and the later rows stay those of the older θ. Where
θ has not moved, ρ_k = 1 to rounding. Γ is the gradient of one scalar per call,

    (1/B) Σ_i max(ρ A, clip(ρ, 1 − ε, 1 + ε) A) + β (1/B) Σ_i c_k,      A = G_k − b,

Proximal Policy Optimization's (Schulman et al., arXiv 1707.06347): a sample whose ratio has left [1 − ε, 1 + ε] in the
direction of its own gradient contributes none. The share of those is in the metrics as `clipped`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.errors import check_number, trying
from implicit_diffusion.gradients import loss_scaling
from implicit_diffusion.gradients.estimator import Carry, Pulled, RowEstimator, RowStates
from implicit_diffusion.gradients.footprint import Footprint, bytes_of, row_activations, variation_activations
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.objectives.variation import Density
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.transition import Transition


class ScoreFunction(RowEstimator):
    """∇ℓ from the values of the reward alone, by the score function of the chain's rows. Needs noise on trained rows.

    Unbiased in nested loops, for terms that look at each sample by itself. Its variance grows with the number of rows
    and pixels: where there is a ∇R, `Adjoint` needs far fewer samples.

    Args:
        clip: ε in (0, 1), how far a ratio may leave 1 before its sample stops contributing; None to clip nothing.

    Raises:
        InvalidInputError: a clip outside of (0, 1).
    """

    parts: ClassVar[Mapping[str, str]] = {"go": "costs to go", "after": "states x", "group": "conditions"}

    def __init__(self, *, clip: float | None = 0.2) -> None:
        self.clip = None if clip is None else check_number("clip", clip, 0, 1, note="; None clips nothing")

    @property
    def name(self) -> str:
        return f"ScoreFunction(clip={self.clip})"

    def check(self, chain: Chain, objective: Objective, end: Particles) -> None:
        """Raise `InvalidInputError` where a trained row has (nearly) no noise, or a terminal term no first variation.

        Terms of weight zero are only reported, and need none.
        """
        check_noise(chain, "ScoreFunction")
        with torch.no_grad(), objective.evaluating():
            for weight, term in objective.terminal:
                if weight != 0:
                    with trying(term.name, f"samples of shape {tuple(end.x.shape)}"):
                        term.first_variation(end)

    def turn(self, objective: Objective, end: Particles) -> tuple[Carry, dict[str, Float[Tensor, ""]]]:
        """The cost to go of x_N; see `terminal_costs`."""
        go, values = terminal_costs(objective, end)
        group = groups(end.condition)
        return {"go": go, "after": end.x} | ({} if group is None else {"group": group}), values

    def pull(self, chain: Chain, objective: Objective, at: RowStates, carry: Carry) -> Pulled:
        """G_{k−1} from G_k."""
        x, go = at.x.detach(), carry["go"]
        batch = go.shape[1] * processes.count()
        advantage = leave_one_out(go, carry.get("group"))
        costs = {}
        with torch.enable_grad():
            transition = chain.transition(x, at.rows, reference=bool(objective.running), condition=at.condition)
            log_rho = log_ratio(transition, carry["after"], at.innovation(chain))
            surrogate, clipped = clipped_objective(log_rho, advantage, self.clip)
            total = surrogate.sum() / batch
            for weight, term in objective.running:
                cost = term.cost(transition)
                total = total + weight * cost.sum() / batch
                costs[term.name] = cost.detach().mean(1)
                go = go + weight * cost.detach()
        if total.requires_grad:  # not where all rows keep the pretrained network
            loss_scaling.backward_through(chain.denoiser, total, transition)
        measured = {"clipped": clipped.to(go.dtype).mean(1)}
        return Pulled({**carry, "go": go, "after": x}, costs, transition.evaluations, measured)

    def memory(self, chain: Chain, objective: Objective, noise: Noise) -> Footprint:
        """A state, a number and, under a condition, its number per sample, and the activations of a single row."""
        row, recomputed = row_activations(chain, objective, noise)
        numbers = bytes_of((), chain.dtype) + (0 if chain.condition is None else bytes_of((), torch.long))
        carry = bytes_of(chain.event_shape, chain.dtype) + numbers
        return Footprint(carry, turn=variation_activations(chain, objective, noise), pull=row + recomputed)


def check_noise(chain: Chain, estimator: str) -> None:
    """Raise `InvalidInputError` where a trained row has (nearly) no noise, and hence no density."""
    otherwise = "for a differentiable reward, use Adjoint, which needs no noise"
    chain.table.check_noise(chain.trained_rows, f"{estimator} needs noise on every trained row", otherwise)


def terminal_costs(
    objective: Objective, end: Particles
) -> tuple[Float[Tensor, " batch"], dict[str, Float[Tensor, ""]]]:
    """F′(x_N) of every sample of this process, −R for a reward, and the terminal terms' values by name, unweighted.

    A term that compares the samples with each other has its first variation at the batch itself, with a bias of O(1/B).
    """
    costs, values = end.x.new_zeros(len(end.x)), {}
    with objective.evaluating():
        for weight, term in objective.terminal:
            if weight == 0:
                values[term.name] = term.shared_value(end).detach()
                continue
            variation = term.shared_variation(end, Density(torch.zeros_like(costs)))
            assert variation.function is not None and variation.value is not None
            costs = costs + weight * variation.function.to(costs.dtype)
            values[term.name] = variation.value.detach()
    return costs, values


def groups(condition: Mapping[str, Shaped[Tensor, "batch ..."]] | None) -> Int[Tensor, " batch"] | None:
    """A number for every sample of this process, the same for all of one condition; None without a condition."""
    if not condition:
        return None
    parts = (processes.gathered(part) for part in condition.values())
    numbers = [torch.unique(part.reshape(len(part), -1), dim=0, return_inverse=True)[1] for part in parts]
    return processes.share(torch.unique(torch.stack(numbers, 1), dim=0, return_inverse=True)[1])


def leave_one_out(
    go: Float[Tensor, "slots batch"], group: Int[Tensor, "slots batch"] | None = None
) -> Float[Tensor, "slots batch"]:
    """G − b, with b the mean of G over the other samples of the same group, in all processes.

    A sample that is alone in its group is compared with all others of the batch; a batch of one has b = 0.

    Args:
        go: costs to go of this process's samples.
        group: their conditions, from `groups`; all the same where None.
    """
    batch = go.shape[1] * processes.count()
    if group is None:
        return go - (processes.total(go.sum(1, keepdim=True)) - go) / max(batch - 1, 1)
    everyone, of = processes.gathered(torch.stack([go, group.to(go.dtype)]), -1)
    same = group[:, :, None] == of[:, None, :]
    same = same | (same.sum(-1, keepdim=True) == 1)
    return go - (torch.where(same, everyone[:, None, :], 0).sum(-1) - go) / (same.sum(-1) - 1).clamp(min=1)


def log_ratio(
    transition: Transition,
    after: Float[Tensor, "slots batch *event"],
    xi: Float[Tensor, "slots batch *event"] | None,
) -> Float[Tensor, "slots batch"]:
    """The log-ratio ⟨D, ξ_k⟩/s_k − ‖D‖²/(2 s_k²), D = mean_θ − (x_{k+1} − s_k ξ_k); zero on rows that are not trained.

    Args:
        transition: of x_k under the present θ.
        after: x_{k+1}.
        xi: ξ_k, replayed; None where all of the rows are deterministic.
    """
    if xi is None:
        return torch.zeros_like(after).flatten(2).sum(-1)
    drift = transition.mean - (after - transition.s * xi)
    shift = drift * torch.where(transition.trained, 1 / transition.s, 0)
    return (shift * xi - shift.square() / 2).flatten(2).sum(-1)


def clipped_objective(
    log_rho: Float[Tensor, "slots batch"], advantage: Float[Tensor, "slots batch"], clip: float | None
) -> tuple[Float[Tensor, "slots batch"], Bool[Tensor, "slots batch"]]:
    """What has the gradient of max(ρ A, clip(ρ, 1 − ε, 1 + ε) A), and where that is zero.

    The maximum is constant where ρ < 1 − ε and A > 0, and where ρ > 1 + ε and A < 0.
    """
    if clip is None:
        return log_rho.exp() * advantage, torch.zeros_like(log_rho, dtype=torch.bool)
    constant = torch.where(advantage > 0, log_rho < math.log1p(-clip), log_rho > math.log1p(clip))
    return torch.where(constant, 0, log_rho).exp() * advantage, constant  # exp of what is constant may overflow
