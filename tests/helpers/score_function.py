"""An estimator with a state of its own, to try the contract of estimators with."""

from implicit_diffusion import processes
from implicit_diffusion.gradients import ScoreFunction


class WithBaseline(ScoreFunction):
    """The score function, less a mean of the rewards of earlier trajectories."""

    def __init__(self):
        super().__init__()
        self.seen, self.baseline = 0, 0.0

    name = "WithBaseline"

    def turn(self, objective, end):
        carry, values = super().turn(objective, end)
        mean = processes.mean(carry["go"].mean()).item()
        carry["go"] = carry["go"] - self.baseline
        self.seen += 1
        self.baseline += (mean - self.baseline) / self.seen
        return carry, values

    def state_dict(self):
        return {"seen": self.seen, "baseline": self.baseline}

    def load_state_dict(self, state):
        self.seen, self.baseline = state["seen"], state["baseline"]
