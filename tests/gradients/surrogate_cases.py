"""What the tests of the surrogate share: other kinds of R̂, chains under classes, and runs in several processes."""

import torch
from torch import nn

from implicit_diffusion.denoisers.conditions import Drawn
from implicit_diffusion.gradients import Surrogate
from implicit_diffusion.gradients.fitted.regression import Regression
from implicit_diffusion.loops import Nested, Queue
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.samplers.chain import Chain
from tests.helpers.chain_loops import Recorder
from tests.helpers.estimates import TanhDenoiser, move
from tests.helpers.oracles import table
from tests.helpers.shared_runs import recorded

F64 = torch.float64
CLASSES = 3


class Fixed(Regression):
    """R̂ as it is given, used in full: it measures and learns nothing."""

    share = 1.0
    explained = 0.0

    def __init__(self, function):
        self.function = function

    def __call__(self, x, condition):
        return self.function(x)

    def learn(self, x, rewards, condition):
        pass

    def state_dict(self):
        return {}


class ByHeart(Fixed):
    """R̂ through all the pairs of the last batch that it learned, by waves that know nothing of what lies between."""

    def __init__(self, dim=2, waves=24):
        self.directions, self.weights = 2 * Noise(6).normal((dim, waves), dtype=F64), torch.zeros(waves, dtype=F64)

    def __call__(self, x, condition):
        return (x @ self.directions + torch.arange(len(self.weights))).sin() @ self.weights

    def learn(self, x, rewards, condition):
        waves = (x @ self.directions + torch.arange(len(self.weights))).sin()
        self.weights = torch.linalg.lstsq(waves, rewards, driver="gelsd").solution


def using(regression, kind=Surrogate, **options):
    """A surrogate with another R̂."""
    surrogate = kind(**options)
    surrogate.regression, surrogate.event_shape = regression, ()
    surrogate.check = lambda chain, objective, end: None
    return surrogate


class Labelled(nn.Module):
    """A small network of x, t and a class."""

    def __init__(self, classes):
        super().__init__()
        self.network, self.shifts = TanhDenoiser(), nn.Embedding(classes, 2, dtype=F64)
        drawn(self)

    def forward(self, x, t, label):
        return self.network(x, t) + self.shifts(label)


def drawn(module):
    """The module with weights that are drawn by key: layers draw their first ones from the global generator."""
    for p in module.parameters():
        p.data.zero_()
    move(module, 0.5)
    return module


def small_chain():
    """A chain on a small network that has moved from the pretrained one."""
    chain = Chain(drawn(TanhDenoiser()), table(4), (2,), pretrained_rows=(3,))
    move(chain.denoiser, 0.2, seed=9)
    return chain


def of_classes(classes):
    """A chain under classes that has moved from the pretrained one."""
    condition = Drawn("label", torch.arange(classes))
    chain = Chain(Labelled(classes), table(4), (2,), pretrained_rows=(3,), condition=condition)
    move(chain.denoiser, 0.2)
    return chain


def per_class(x, condition):
    """A black box whose slope has another sign in every other class."""
    slope = 1.0 - condition["label"].to(x.dtype)
    return ((slope[:, None] * x).sum(1) * 20).round() / 20 + slope


def class_loop(kind, optimizer=Recorder, lr=0.02, batch=6, **options):
    """A loop under classes, whose surrogate has learned from pretrained samples."""
    chain = of_classes(CLASSES)
    surrogate = Surrogate(pairs=128, steps=3, learning_rate=1e-2)
    before = chain.pretrained()
    end = before.endpoint(before.sample(Noise(5), 96), Noise(5))
    surrogate.learn(end.x, per_class(end.x, end.condition), end.condition)
    objective = Reward(per_class) + 0.3 * PathKL()
    update = optimizer(chain.denoiser.parameters(), lr=lr)
    return kind(chain, objective, update, batch=batch, noise=Noise(3), estimator=surrogate, **options)


def class_runs(updates):
    """Runs under classes, nested and queued; called in all processes alike."""
    return [recorded(class_loop(Nested), updates), recorded(class_loop(Queue, stride=2), updates)]


def sharded_run(kind, sharded):
    """Metrics and θ of a run whose network's weights may be shared out over the processes."""
    from implicit_diffusion import processes
    from tests.denoisers import sharded_cases

    loop = sharded_cases.loop(kind, sharded=sharded)
    loop.estimator = Surrogate(steps=4, learning_rate=1e-2)
    x = Noise(1).normal((256, 1, 8, 8), dtype=F64)
    loop.estimator.learn(x, x.flatten(1).sum(1))
    metrics = sharded_cases.numbers(loop.run(3))
    with processes.sharing():
        return metrics, sharded_cases.trained_state(loop.model)
