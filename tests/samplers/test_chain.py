"""The denoising chain: what it computes in."""

import pytest
import torch
from torch import nn

from implicit_diffusion.gradients import Adjoint
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.table import ChainTable

TABLE = ChainTable(
    a=torch.ones(3),
    b=torch.full((3,), 0.01234567),
    s=torch.full((3,), 0.1),
    m=torch.ones(3),
    t=torch.tensor([999.0, 501.0, 333.0]),
    h=torch.ones(3),
)


class Net(nn.Module):
    """A network that remembers what it was called with."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, -1.3], dtype=dtype))
        self.seen = []

    def forward(self, x, t):
        self.seen.append((x.dtype, t.tolist()))
        return x * self.weight


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_is_called_in_it_and_nothing_else_is_rounded(half):
    net = Net(half)
    chain = Chain(net, TABLE, (2,))
    x = chain.initial(Noise(0), 4)[None]
    here = chain.transition(x, [1], reference=True)
    assert net.seen == [(half, 4 * [501.0])]
    assert {chain.dtype, x.dtype, here.u.dtype, here.u0.dtype, here.b.dtype} == {torch.float32}
    assert here.b.item() == torch.tensor(0.01234567).item()
    assert torch.equal(here.u, (x.to(half) * net.weight).float())
    assert torch.equal(x[0], Chain(Net(), TABLE, (2,)).initial(Noise(0), 4))
    values = Adjoint()(chain, Reward(lambda x: x.sum(1)) + PathKL(), Noise(0), 4)
    assert {v.dtype for v in values.values()} == {torch.float32} and net.weight.grad.dtype == half
    assert chain.sample(Noise(0), 4).dtype == torch.float32


def test_double_precision_stays_and_a_reference_may_have_less():
    chain = Chain(Net(torch.float64), TABLE, (2,), reference=Net(torch.bfloat16))
    here = chain.transition(chain.initial(Noise(0), 4)[None], [0], reference=True)
    assert here.u.dtype == here.u0.dtype == chain.dtype == torch.float64
    assert chain.reference.seen[0][0] == torch.bfloat16
