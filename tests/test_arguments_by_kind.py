"""Arguments of public functions, kind by kind: what is refused says which argument it was and what would work.

All of them, with everything that may be wrong, are in `test_fuzz_api`.
"""

import math

import pytest
import torch
from torch import nn

import implicit_diffusion as idf
from implicit_diffusion.errors import InvalidInputError, MemoryLimitError
from implicit_diffusion.loops.memory import check_memory
from implicit_diffusion.objectives import Sum
from implicit_diffusion.samplers.simulation import simulate
from tests.helpers.oracles_gibbs import Banana

pytestmark = pytest.mark.usefixtures("as_users_run")

F64 = torch.float64
X = torch.linspace(-1, 1, 24, dtype=F64).view(12, 2) ** 3
TABLE, NOISE = idf.tables.ou_reverse_sde(3, 2.0), idf.Noise(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=F64))

    def forward(self, x, t):
        return self.weight * x


def reward(x):
    return x.sum(1)


def chain(denoiser=None, table=TABLE, shape=(2,), **more):
    return idf.Chain(Net() if denoiser is None else denoiser, table, shape, **more)


def queue(made=None, objective=None, **more):
    made = chain() if made is None else made
    objective = idf.Reward(reward) if objective is None else objective
    return idf.Queue(
        made, objective, torch.optim.SGD(made.denoiser.parameters()), **{"batch": 2, "noise": NOISE} | more
    )


def single(function=reward, potential=None, **more):
    net = Banana() if potential is None else potential
    sgd = torch.optim.SGD(net.parameters())
    return idf.Single(net, idf.ULA(0.1), idf.Reward(function), sgd, **{"particles": X, "noise": NOISE} | more)


def missing(x):
    raise KeyError("colour")


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 2, dtype=F64)

    def forward(self, x, t=None):
        return self.layer(x)


BAD = {
    # counts
    r"batch must be an integer ≥ 1, got 0\.5": lambda: queue(batch=0.5),
    "batch must be an integer ≥ 1, got True": lambda: queue(batch=True),
    r"stride must lie in 1\.\.3 \(the chain's steps\), got 4": lambda: queue(stride=4),
    r"updates must be an integer ≥ 0, got None": lambda: next(queue().run(None)),
    "starts must be an integer ≥ 1, got '4'": lambda: idf.evaluate(chain(), reward, NOISE, starts="4"),
    r"event_shape must hold positive sizes.*got tuple of 2, 1\.5": lambda: chain(shape=(2, 1.5)),
    r"pretrained_rows must lie in 0\.\.2, got tuple of 3": lambda: chain(pretrained_rows=[3]),
    # numbers
    "max_grad_norm must be positive and finite, or None, got 'a'": lambda: idf.Update(
        torch.optim.SGD(Net().parameters()), max_grad_norm="a"
    ),
    r"ema_decay must lie in \(0, 1\), e\.g\. 0\.99, or None, got torch.float32 with shape \(2,\)": lambda: idf.Update(
        torch.optim.SGD(Net().parameters()), ema_decay=torch.ones(2)
    ),
    "horizon must be positive and finite, got nan": lambda: idf.tables.ou_reverse_sde(3, math.nan),
    "initial_std must be positive and finite, got None": lambda: idf.ChainTable(
        *(getattr(TABLE, name) for name in "absmth"), initial_std=None
    ),
    "the divisor of an objective must not be 0": lambda: idf.PathKL() / 0,
    "the weight of path_kl must be finite, got inf": lambda: Sum(((math.inf, idf.PathKL()),)),
    "available must be an integer ≥ 0, got -1": lambda: check_memory(idf.loops.predict_memory(queue()), "cpu", -1),
    # tensors
    "column b must be of type Tensor, got list": lambda: idf.ChainTable(TABLE.a, [1.0], *[TABLE.a] * 4),
    "column a must hold real numbers, got torch.complex64": lambda: idf.ChainTable(*[TABLE.a.to(torch.complex64)] * 6),
    "log_weights must be floating-point numbers of shape \\(12,\\)": lambda: idf.Particles(X, X),
    "values must be a tensor of integers with shape \\(m\\)": lambda: idf.denoisers.Drawn("label", torch.ones(3)),
    "mean must be a tensor of floating-point .* on the meta device": lambda: (
        idf.denoisers.GaussianDenoiser.ornstein_uhlenbeck(torch.ones(2, device="meta"), 1.0)
    ),
    # functions that take something else, and what they raise
    "reward must be a function of samples, got 3": lambda: idf.Reward(3),
    "reward must be a function.* got the class Net": lambda: idf.Reward(Net),
    r"reward fails on samples of shape \(2, 2\): TypeError: .*takes 0 positional": lambda: queue(
        objective=idf.Reward(lambda: 0)
    ),
    "denoiser must be a function that is called with x and t.*too many": lambda: chain(lambda x: x),
    "condition must be a function that is called with noise and batch": lambda: chain(condition=lambda noise: {}),
    r"denoiser fails on states of shape \(2, 2\): RuntimeError: mat1 and mat2": lambda: queue(chain(Broken())),
    r"denoiser fails on states of shape \(4, 2\): RuntimeError": lambda: chain(Broken()).sample(NOISE, 4),
    r"potential fails on particles of shape \(2, 2\).*mat1 and mat2": lambda: single(potential=Broken()),
    r"reward fails on samples of shape \(2, 2\): KeyError: 'colour' \(.*test_arguments_by_kind.py, line": lambda: queue(
        objective=idf.Reward(missing)
    ),
    r"reward fails on the initial particles: KeyError": lambda: single(missing),
    "reward fails on samples of shape .*KeyError": lambda: idf.evaluate(chain(), missing, NOISE, starts=2),
    # words, names and things of another type
    "name must be a word under which metrics report the term, got list of 'a'": lambda: idf.Reward(reward, ["a"]),
    "the kind of terms must be a class such as PathKL, got PathKL": lambda: idf.PathKL().weight(idf.PathKL()),
    r"terms must be pairs \(weight, term\), got list of tuple of 1, 2": lambda: Sum([(1, 2)]),
    "prediction must be one of score, .*got None": lambda: idf.denoisers.GaussianDenoiser.ornstein_uhlenbeck(
        X[0], 1.0, None
    ),
    "scheduler must be a diffusers scheduler, got 'ddpm'": lambda: idf.tables.default_sampler("ddpm"),
    "chain must be of type Chain, got None": lambda: idf.gradients.Adjoint()(None, idf.PathKL(), NOISE, 2),
    "evaluation must be of type Evaluation, got float": lambda: idf.evaluation.bound(0.5, 1.0),
    "loop must be of type ChainLoop, got Single": lambda: idf.loops.predict_memory(single()),
    "state must be of type Mapping, got list": lambda: queue().load_state_dict([]),
    "state is not that of a loop, or damaged: it lacks .*model.*update": lambda: queue().load_state_dict({}),
    "schedule must be of type LRScheduler, got float": lambda: idf.Update(
        torch.optim.SGD(Net().parameters()), schedule=0.5
    ),
    'model must be "digits", a folder or a hub id owner/name, got 3': lambda: idf.load_pretrained(3),
    "model must be of type Module, got function": lambda: idf.denoisers.DiffusersDenoiser(lambda x, t: x),
    "device 'gpu' draws no random numbers": lambda: NOISE.generator(device="gpu"),
    "a size in shape must be an integer ≥ 0, got -1": lambda: NOISE.normal((2, -1)),
    "dtype must be one of torch's floating-point types, got torch.int64": lambda: NOISE.normal((2,), dtype=torch.long),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_is_named(message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        BAD[message]()
    assert "\n" not in str(caught.value)


def test_sizes_that_no_memory_holds():
    for call in (
        lambda: NOISE.normal((2**31 - 1, 2**31 - 1)),
        lambda: chain(shape=(2**30, 2**30)).sample(NOISE, 2),
    ):
        with pytest.raises(MemoryLimitError, match="random numbers do not fit into memory"):
            call()


def test_errors_of_a_network_that_has_worked_are_its_own():
    """Only its first call is a trial: later on a traceback says more."""
    net = Net()
    made = chain(net)
    made.sample(NOISE, 2)
    net.forward = missing
    with pytest.raises(TypeError):
        made.sample(NOISE, 2)


def test_simulations_check_their_arguments():
    with pytest.raises(InvalidInputError, match="steps must be an integer ≥ 0, got -1"):
        list(simulate(idf.ULA(0.1), Banana(), X, NOISE, -1))
