"""The parameter step takes Γ and nothing else: what lay in `.grad`, what went wrong before, and what trains layers."""

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.loops import Queue, Single, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, Reward
from implicit_diffusion.potentials import Tilted
from implicit_diffusion.samplers import ULA
from tests.loops import gibbs_loops, test_loops
from tests.oracles import affine_chain

F64 = torch.float64
CHAINS = {"queue": test_loops.build, "nested": test_loops.build}
PARTICLES = ("ula", "nested", "unrolled")


def build(name):
    if name in CHAINS:
        return CHAINS[name](name)[0]
    return gibbs_loops.build(name)


@pytest.mark.parametrize("name", [*CHAINS, *PARTICLES])
@pytest.mark.parametrize("left", [5.0, float("nan")])
def test_gradients_of_others_are_dropped(name, left):
    clean, stained = build(name), build(name)
    for _ in range(8):
        for p in stained.model.parameters():
            p.grad = torch.full_like(p, left)
        clean.step(), stained.step()
    for a, b in zip(clean.model.parameters(), stained.model.parameters()):
        assert torch.equal(a, b)


def test_after_an_error_the_gradient_is_gone():
    """The step that failed is as if it had not been: what comes next starts from the last good θ without its NaN."""
    loop = gibbs_loops.build("ula")
    loop.step()
    good, theta = loop.objective, [p.detach().clone() for p in loop.model.parameters()]
    loop.objective = Reward(lambda x: x[:, 0] / 0)
    with pytest.raises(NonFiniteError):
        loop.step()
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(loop.model.parameters(), theta))
    loop.objective = good
    assert loop.step()["grad_norm"].isfinite() and all(p.isfinite().all() for p in loop.model.parameters())


def test_an_update_serves_one_loop():
    chain, reward = affine_chain(4, 2)
    update = Update(torch.optim.SGD(chain.denoiser.parameters(), lr=0.1))
    Queue(chain, Reward(reward), update, batch=2, noise=Noise(0))
    with pytest.raises(InvalidInputError, match="already serves another loop"):
        Queue(chain, Reward(reward), update, batch=2, noise=Noise(0))


def test_spectral_norms_stay_at_one():
    """Evaluation mode would leave the power iteration out, and the layer would divide by the norm of old weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.utils.parametrizations.spectral_norm(nn.Linear(d, 16)) for d in (2, 16)]
        net = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), nn.Linear(16, 1)).double()
    potential = Tilted(net, (2,))
    data = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=F64) + 1
    adam = torch.optim.Adam(potential.parameters(), lr=1e-2)
    loop = Single(potential, ULA(0.1), ForwardKL(data), adam, particles=data, noise=Noise(0))
    for _ in range(200):
        loop.step()
    assert not loop.update.plain
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.detach(), 2) == pytest.approx(1, abs=0.02)
        assert not layer.training or layer.parametrizations.weight[0].training  # modes are as they were
