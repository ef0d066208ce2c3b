"""The simplest estimator that needs no gradient of the reward, to try the contract of estimators with.

With the row's law N(mean_θ, s² I) and the return to go G_k = F′ + β Σ_{j>k} c_j,

    Γ = (1/B) Σ_i Σ_k ρ_k ∇ log N(x_{k+1}; mean_θ, s_k²) (G_k − b) + β Σ_k ∇_θ mean c_k,

with b the mean over the other samples, and ρ_k the ratio of the present density to the one that x_{k+1} was drawn from:
it is replayed from ξ_k. What a slot carries back is G_k and x_{k+1}.
"""

import torch

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients.estimator import Pulled, RowEstimator
from implicit_diffusion.gradients.footprint import Footprint, bytes_of, row_activations
from implicit_diffusion.objectives.variation import Density


class ScoreFunction(RowEstimator):
    def check(self, chain, objective, end):
        bad = [row for row in chain.trained_rows if chain.table.s[row] == 0]
        if bad:
            raise InvalidInputError(f"ScoreFunction needs noise on every trained row, but row {bad[0]} has s = 0")

    def turn(self, objective, end):
        values, total = {}, end.x.new_zeros(len(end.x))
        for weight, term in objective.terminal:
            variation = term.shared_variation(end, Density(end.x.new_zeros(len(end.x))))
            values[term.name] = variation.value
            total = total + weight * variation.function
        return {"return": total, "after": end.x}, values

    def pull(self, chain, objective, at, carry):
        x, go, after = at.x.detach(), carry["return"], carry["after"]
        xi = at.innovation(chain)
        batch = go.shape[1] * processes.count()
        advantage = (go - processes.mean(go.mean(1, keepdim=True))) * batch / (batch - 1)  # less the mean of the others
        costs = {}
        with torch.enable_grad():
            transition = chain.transition(x, at.rows, reference=bool(objective.running), condition=at.condition)
            log_density = -((after - transition.mean) / transition.s).square().flatten(2).sum(-1) / 2
            ratio = torch.exp(log_density + xi.square().flatten(2).sum(-1) / 2)
            surrogate = (ratio * advantage).sum() / batch
            for weight, term in objective.running:
                cost = term.cost(transition)
                surrogate = surrogate + weight * cost.sum() / batch
                costs[term.name] = cost.detach().mean(1)
                go = go + weight * cost.detach()
        if surrogate.requires_grad:  # not on rows that keep the pretrained network
            surrogate.backward()
        return Pulled({"return": go, "after": x}, costs, transition.evaluations)

    def memory(self, chain, objective, noise):
        row, again = row_activations(chain, objective, noise)
        event = bytes_of(chain.event_shape, chain.dtype)
        return Footprint(carry=event + bytes_of((), chain.dtype), turn=0, pull=row + again)


class WithBaseline(ScoreFunction):
    """The same, less a mean of the rewards of earlier trajectories: an estimator with a state of its own."""

    def __init__(self):
        self.seen, self.baseline = 0, 0.0

    def turn(self, objective, end):
        carry, values = super().turn(objective, end)
        mean = processes.mean(carry["return"].mean()).item()
        carry["return"] = carry["return"] - self.baseline
        self.seen += 1
        self.baseline += (mean - self.baseline) / self.seen
        return carry, values

    def state_dict(self):
        return {"seen": self.seen, "baseline": self.baseline}

    def load_state_dict(self, state):
        self.seen, self.baseline = state["seen"], state["baseline"]
