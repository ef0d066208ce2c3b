"""A run that stops at a path KL is there: in closed form, whatever the size of its steps."""

import math

import pytest
import torch

from implicit_diffusion.loops import Queue, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.callbacks.targets import StopAtKL
from implicit_diffusion.runs.fit import fit
from tests.helpers.oracles import affine_chain, exact_terms
from tests.helpers.stops import interrupt_at

TARGET = 0.1


class Counted(HeldOut):
    """Counts its evaluations by update."""

    def evaluate(self, state):
        self.seen = [*getattr(self, "seen", []), state.updates]
        return super().evaluate(state)


def run(lr, *others, directory=None, starts=1000, **update):
    chain, reward = affine_chain(4, 2)
    adam = torch.optim.Adam(chain.denoiser.parameters(), lr=lr)
    loop = Queue(chain, Reward(reward) + 0.3 * PathKL(), Update(adam, **update), batch=16, noise=Noise(0))
    looks = Counted(reward, Noise(1), starts=starts)
    found = fit(loop, 600, callbacks=[*others, StopAtKL(TARGET, held_out=looks)], directory=directory)
    return found, exact_terms(found.chain, reward)[1].item(), looks.seen


@pytest.mark.parametrize("lr", [pytest.param(5e-4, marks=pytest.mark.slow), 5e-3, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_path_kl_is_the_target(lr, ema):
    """Within four standard errors of the held-out noise, and a fiftieth; what is judged is the average's."""
    found, exact, looks = run(lr, ema_decay=ema)
    seen = found.kept
    assert "reached the target 0.1" in found.stopped and "The model is put between" in found.stopped
    assert abs(exact / TARGET - 1) < 0.02 + 6 * seen["path_kl_se"] / TARGET < 0.2
    assert abs(seen["path_kl"] / TARGET - 1) <= max(0.02, 2 * seen["path_kl_se"] / TARGET)
    assert found.updates - seen["updates"] <= max(1, found.updates / 4) and 0 < seen["share"] <= 1
    training = [n for n in looks if 0 < n < found.updates]
    assert len(training) <= 3 * math.log2(2 * found.updates) + 4


def test_it_goes_on_bit_for_bit_and_not_beyond(tmp_path):
    """Interrupted before, and where it stops; called again when it has stopped."""
    whole = run(5e-3)[0]
    directory = RunDirectory(tmp_path / "run")
    for at in (1, 7, whole.updates):
        assert run(5e-3, interrupt_at(at), directory=directory)[0].stopped == "interrupted"
    for _ in range(2):
        again = run(5e-3, directory=directory)[0]
        assert (again.updates, again.stopped, again.kept) == (whole.updates, whole.stopped, whole.kept)
        for p, q in zip(again.model.parameters(), whole.model.parameters()):
            assert torch.equal(p, q)


def test_a_target_that_is_not_reached_leaves_the_run_alone():
    chain, reward = affine_chain(4, 2)
    adam = torch.optim.Adam(chain.denoiser.parameters(), lr=1e-3)
    loop = Queue(chain, Reward(reward) + 0.3 * PathKL(), adam, batch=16, noise=Noise(0))
    looks = Counted(reward, Noise(1), starts=50)
    found = fit(loop, 20, callbacks=[StopAtKL(1e3, held_out=looks)])
    assert found.updates == 20 and found.stopped is None and found.kept is None
    assert looks.seen == [0, 1, 2, 4, 8, 16, 20]
