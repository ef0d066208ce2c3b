"""Data, references and particles that do not fit each other, under one wording for all objectives that hold data."""

import numpy as np
import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.loops import Single
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD, ForwardKL, ReverseKL, Reward, Sinkhorn, gaussian_kernel
from implicit_diffusion.potentials import Tilted, mlp
from implicit_diffusion.samplers import ULA
from tests.helpers.oracles_gibbs import Banana

F64 = torch.float64
X = torch.linspace(-1, 1, 24, dtype=F64).view(12, 2) ** 3
BUILDS = {"ForwardKL": ForwardKL, "MMD": MMD, "Sinkhorn": lambda data: Sinkhorn(data, 1.0)}
DATA = {
    r"data must be of type Tensor, got ndarray; use torch\.as_tensor\(data\)": X.numpy(),
    r"floating-point numbers with shape \(m, \*event\), got torch\.int64": torch.eye(2, dtype=torch.int64),
    r"floating-point numbers with shape \(m, \*event\), got torch\.float64 with shape \(24,\)": X.flatten(),
    r"{}: data are torch\.float32 on cpu, particles torch\.float64 on cpu; use data\.to\(x\)": X.float(),
    r"{}: data have event shape \(1,\), particles \(2,\); they must agree": X[:, :1],
}

pytestmark = pytest.mark.usefixtures("as_users_run")


def single(objective, particles=X, potential=None):
    v = potential or Banana()
    return Single(v, ULA(0.1), objective, torch.optim.SGD(v.parameters()), particles=particles, noise=Noise(0))


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("message", DATA)
def test_data_that_do_not_fit(message, name):
    with pytest.raises(InvalidInputError, match=message.format(name)):
        single(BUILDS[name](DATA[message]))


def test_data_that_are_mostly_equal_have_no_bandwidth_of_their_own():
    data = torch.cat([torch.zeros(9, 2, dtype=F64), torch.ones(1, 2, dtype=F64)])
    with pytest.raises(InvalidInputError, match=r"median distance, .* pass kernel=gaussian_kernel\(bandwidth\)"):
        MMD(data)
    MMD(data, gaussian_kernel(1.0))


class Column(Banana):
    def forward(self, x):
        return super().forward(x)[:, None]


OTHERS = {
    r"ReverseKL: its potential is torch\.float32 on cpu, particles torch\.float64": lambda: single(
        ReverseKL(Tilted(mlp(2, Noise(0), width=4), (2,)))
    ),
    r"numbers of torch\.float64, \(12,\) on the particles, got torch\.float64, \(12, 1\)": lambda: single(
        ReverseKL(Column())
    ),
    "on the particles, got torch.float32": lambda: single(ReverseKL(lambda x: x.float().sum(1))),
    "on the particles, got float": lambda: single(ReverseKL(lambda x: 1.0)),
    r"particles must be of type Tensor, got ndarray; use torch\.as_tensor": lambda: single(
        Reward(lambda x: x.sum(1)), X.numpy()
    ),
    r"network of Tilted must return shape \(n,\) or \(n, 1\), got \(2, 3\) for 2 particles": lambda: single(
        ForwardKL(X), potential=Tilted(torch.nn.Linear(2, 3, dtype=F64), (2,))
    ),
}


@pytest.mark.parametrize("message", OTHERS)
def test_references_and_particles_that_do_not_fit(message):
    with pytest.raises(InvalidInputError, match=message):
        OTHERS[message]()


def test_a_number_of_particles_may_be_numpys():
    tilted = Tilted(mlp(2, Noise(0), width=4).double(), (2,))
    assert single(ForwardKL(X), np.int64(5), tilted).n == 5
