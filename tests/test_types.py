"""Arguments of the wrong type are refused by name, with the way out."""

import numpy as np
import pytest
import torch

import implicit_diffusion as idf
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.runs.devices import find_device
from implicit_diffusion.samplers.simulation import simulate
from tests.helpers.oracles_gibbs import Banana

pytestmark = pytest.mark.usefixtures("as_users_run")

F64 = torch.float64
X = torch.linspace(-1, 1, 24, dtype=F64).view(12, 2) ** 3
TABLE = idf.tables.ou_reverse_sde(3, 2.0)
NOISE = idf.Noise(0)


def reward(x):
    return x.sum(1)


KERNEL, REWARD = idf.ULA(0.1), idf.Reward(reward)


def net():
    return idf.denoisers.GaussianDenoiser.ornstein_uhlenbeck(torch.zeros(2, dtype=F64), 0.5)


def single(potential=None, kernel=KERNEL, objective=REWARD, optimizer=None, noise=NOISE, particles=X):
    v = Banana() if potential is None else potential
    sgd = optimizer or torch.optim.SGD(Banana().parameters() if potential else v.parameters())
    return idf.Single(v, kernel, objective, sgd, particles=particles, noise=noise)


def queue(chain=None, objective=REWARD, noise=NOISE):
    network = net()
    made = idf.Chain(network, TABLE, (2,)) if chain is None else chain
    return idf.Queue(made, objective, torch.optim.SGD(network.parameters()), batch=2, noise=noise)


class UNet2DOutput:
    """What a diffusers network returns."""


class DDPMScheduler:
    """What stands beside it."""


BAD = {
    r"objective must be of type Objective, got function; .*Reward\(f\)": [
        lambda: single(objective=reward),
        lambda: queue(objective=reward),
    ],
    "objective must be of type Objective, got the class PathKL": [lambda: queue(objective=idf.PathKL)],
    r"noise must be of type Noise, got int; use Noise\(0\), for example": [
        lambda: single(noise=0),
        lambda: queue(noise=0),
        lambda: idf.Chain(net(), TABLE, (2,)).sample(0, 2),
        lambda: idf.evaluate(idf.Chain(net(), TABLE, (2,)), reward, 0, starts=2),
        lambda: idf.samplers.warm_up(idf.MALA(0.1), Banana(), X, 0),
        lambda: idf.samplers.Replicas(idf.ULA(0.1), Banana(), X, 0, groups=2),
        lambda: next(simulate(idf.ULA(0.1), Banana(), X, 0, 3)),
    ],
    r"kernel must be of type Kernel, got the class ULA; use ULA\(0\.1\)": [lambda: single(kernel=idf.ULA)],
    "chain must be of type Chain, got Banana": [lambda: queue(chain=Banana())],
    "the potential must be of type Module, got function": [lambda: single(potential=lambda x: x.square().sum(1))],
    "the denoiser must be of type Module, got function": [
        lambda: queue(chain=idf.Chain(lambda x, t: x, TABLE, (2,), reference=net()))
    ],
    "update must be of type Optimizer, got generator": [lambda: single(optimizer=Banana().parameters())],
    r"got UNet2DOutput; .*DiffusersDenoiser\(model\)": [
        lambda: idf.Chain(lambda x, t: UNet2DOutput(), TABLE, (2,)).sample(NOISE, 2)
    ],
    r"table must be of type ChainTable, got DDPMScheduler; .*read_table\(scheduler": [
        lambda: idf.Chain(net(), DDPMScheduler(), (2,))
    ],
    r"event_shape must be of type Iterable, got int; .*\(2,\)": [lambda: idf.Chain(net(), TABLE, 2)],
    "denoiser must be of type Callable, got int": [lambda: idf.Chain(3, TABLE, (2,))],
    r"integers ≥ 0, got \(0\.5,\)": [lambda: idf.Noise(0.5)],
    r"integers ≥ 0, got \('a',\)": [lambda: idf.Noise("a")],
    r"integers ≥ 0, got \(0, 1\.5\)": [lambda: NOISE.stream(1.5)],
    "added to an objective must be of type Objective, got int": [lambda: idf.Reward(reward) + 1],
    "added to an objective must be of type Objective, got function": [
        lambda: idf.Reward(reward) + reward,
        lambda: reward + idf.Reward(reward),
    ],
    "subtracted from an objective must be of type Objective, got function": [lambda: idf.Reward(reward) - reward],
    "weight of an objective must be of type SupportsFloat, got Reward": [
        lambda: idf.Reward(reward) * idf.Reward(reward)
    ],
    "divisor of an objective must be of type SupportsFloat, got str": [lambda: idf.Reward(reward) / "2"],
    "`device` gpu: .*; use auto, cpu": [lambda: find_device("gpu")],
    "`device` cpu:1.5: .*; use auto, cpu": [lambda: find_device("cpu:1.5")],
}


@pytest.mark.parametrize(("message", "call"), [(message, call) for message, calls in BAD.items() for call in calls])
def test_arguments_of_the_wrong_type(message, call):
    with pytest.raises(InvalidInputError, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is there")
def test_a_device_that_is_not_there():
    with pytest.raises(InvalidInputError, match="`device` cuda: "):
        find_device("cuda")
    assert find_device("cpu") == torch.device("cpu")


def test_objectives_sum_and_divide():
    a, b = idf.Reward(reward, name="a"), idf.Reward(reward, name="b")
    assert repr(sum([a, 2 * b])) == "1·a + 2·b" and repr((a - b) / 2) == "0.5·a + -0.5·b"
    for weight in (np.float32(0.5), np.int64(1), torch.tensor(0.5)):
        ((number, _),) = (weight * a).terms
        assert type(number) is float and number == float(weight)


def test_numpy_seeds_are_seeds(tmp_path):
    loop = single(noise=idf.Noise(np.int64(3)).stream(np.int64(1)))
    save_state(tmp_path, loop.state_dict())
    assert idf.Noise(np.int64(3)) == idf.Noise(3) and load_state(tmp_path)["stream"] == [1]
