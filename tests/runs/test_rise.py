"""J that rises above the pretrained chain's is said while the training runs."""

from types import SimpleNamespace

import pytest
import torch

from implicit_diffusion.loops import Nested
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.runs.fit import HeldOut, fit
from implicit_diffusion.runs.rise import Rise
from tests.oracles import affine_chain, exact_terms


def train(lr):
    chain, reward = affine_chain(3, 2)
    loop = Nested(
        chain,
        Reward(reward) + 0.7 * PathKL(),
        torch.optim.SGD(chain.denoiser.parameters(), lr=lr),
        batch=64,
        noise=Noise(0),
    )
    said = []
    watch = Rise(-exact_terms(chain.pretrained(), reward)[0].item(), say=said.append)
    fit(loop, 4, callbacks=[HeldOut(reward, Noise(1), every=2, starts=500), watch])
    return said


def test_too_large_a_rate_is_said_once_and_a_good_one_is_not():
    assert train(0.02) == []
    (line,) = train(1.5)
    assert "the pretrained model: this training makes it worse" in line and "smaller learning rate" in line


def test_only_what_is_clear_is_said_and_taken_back(capsys, as_users_run):
    watch, state = Rise(-30.0, 0.3), SimpleNamespace(updates=2, metrics={})
    for now, error in ((None, 0), (-28.1, 0.4), (-27.9, 0.4), (-20.0, 0.4), (-29.9, 0.4), (-30.1, 0.4)):
        state.metrics = {} if now is None else {"held_out_objective": now, "held_out_objective_se": error}
        watch(state)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "update 2: J on held-out noise is -27.9 ± 0.5",
        "update 2: J on held-out noise is -30.1 ± 0.5",
    ]


@pytest.mark.parametrize("above", [True, False])
def test_a_resumed_run_does_not_repeat_it(above):
    first, second = Rise(0.0), Rise(0.0)
    first.above = above
    second.load_state_dict(first.state_dict())
    assert second.above is above
