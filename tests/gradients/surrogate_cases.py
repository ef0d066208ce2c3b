"""What the tests of the surrogate share: other kinds of R̂, chains under classes, and runs in several processes."""

import torch
from torch import nn

from implicit_diffusion.denoisers.conditions import Drawn
from implicit_diffusion.gradients import Surrogate
from implicit_diffusion.gradients.surrogate_regression import Regression
from implicit_diffusion.loops import Nested, Queue
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.samplers.chain import Chain
from tests.helpers.chain_loops import Recorder
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


class Small(nn.Module):
    """u(x, t, c): a small network with a curved drift, which may differ between classes."""

    def __init__(self, dim, classes=1):
        super().__init__()
        self.first, self.last = nn.Linear(dim + 1, 8).to(F64), nn.Linear(8, dim).to(F64)
        self.labels = nn.Embedding(classes, 8).to(F64)
        for index, p in enumerate(self.parameters()):
            p.data.copy_(0.4 * Noise(1).normal(tuple(p.shape), index, dtype=F64))

    def forward(self, x, t, label=None):
        h = self.first(torch.cat([x, 0.2 * t[:, None].to(x)], 1))
        return self.last(torch.tanh(h if label is None else h + self.labels(label)))


def small_chain(steps=4, dim=2, classes=None, pretrained_rows=()):
    """A chain on the small network, away from its reference."""
    condition = None if classes is None else Drawn("label", torch.arange(classes))
    net = Small(dim, classes or 1)
    chain = Chain(net, table(steps), (dim,), pretrained_rows=pretrained_rows, condition=condition)
    for p in net.parameters():
        p.data *= 1.3
    return chain


def per_class(x, condition):
    """A black box whose slope has another sign in every other class."""
    slope = 1.0 - condition["label"].to(x.dtype)
    return ((slope[:, None] * x).sum(1) * 20).round() / 20 + slope


def class_loop(kind, optimizer=Recorder, lr=0.02, batch=6, **options):
    """A loop under classes, whose surrogate has learned from pretrained samples."""
    chain = small_chain(classes=CLASSES, pretrained_rows=(3,))
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
