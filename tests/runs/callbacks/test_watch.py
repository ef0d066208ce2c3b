"""Trainings that run away though their numbers are finite, and states that are not: neither replaces a sound one."""

import math
from types import SimpleNamespace

import pytest
import torch

from implicit_diffusion.errors import DivergenceError, NonFiniteError
from implicit_diffusion.loops import Queue, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import DriftPenalty, Reward
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.callbacks.watch import Runaway
from implicit_diffusion.runs.fit import fit
from tests.helpers.oracles import affine_chain, exact_terms
from tests.runs.test_fit import build, weights


def saved_updates(directory):
    return directory.read_checkpoint().state["loop"]["update"]["updates"]


@pytest.mark.parametrize("where", ["exp_avg", "exp_avg_sq"])
def test_moments_of_the_optimizer_that_are_not_finite_are_not_saved(where, tmp_path):
    loop, directory = build()[0], RunDirectory(tmp_path / "run")

    def spoil(state):
        if state.updates == 5:
            next(iter(loop.update.optimizer.state.values()))[where][0] = math.nan
        return "enough" if state.updates == 5 else None

    with pytest.raises(NonFiniteError, match=rf"after update 5: .*'{where}'\] holds NaN.* good state .*, of update 0"):
        fit(loop, 30, callbacks=[spoil], directory=directory)
    assert saved_updates(directory) == 0


def test_a_mask_of_infinities_among_the_buffers_is_saved(tmp_path):
    loop, _ = build(ema_decay=0.9)
    for module in (loop.model, loop.update.ema.module):
        module.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    fit(loop, 2, directory=RunDirectory(tmp_path / "run"))
    assert saved_updates(RunDirectory(tmp_path / "run")) == 2


def pushed(state, to):
    """The chain moved so far from the pretrained one that its path KL is astronomic, and finite."""
    state.loop.chain.denoiser.shift.data.fill_(to)


@pytest.mark.parametrize("every", [0.0, 1e9])
def test_a_path_kl_that_blows_up_stops_and_is_not_saved(every, tmp_path):
    loop, reward = build(lr=1e-6)
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(
        DivergenceError, match=r"after update \d+: the path KL is .*e\+1\d nats: beyond .* `lr`.*of update"
    ):
        fit(
            loop,
            60,
            callbacks=[Runaway(1.0), lambda f: pushed(f, 3e7) if f.updates == 21 else None],
            directory=directory,
            checkpoint_every=every,
        )
    assert exact_terms(loop.chain, reward)[1] > 1e14
    kept = saved_updates(directory)
    assert kept == (0 if every else 20)  # the numbers of update 22 tell of the state after 21
    again = build(lr=1e-6)[0]
    assert fit(again, 60, callbacks=[Runaway(1.0)], directory=directory).updates == 60


def test_a_run_that_ends_run_away_does_not_end_well(tmp_path):
    """Without a second look: what would be judged is what ran away."""
    loop, directory = build(lr=1e-6)[0], RunDirectory(tmp_path / "run")
    with pytest.raises(DivergenceError, match="after update 25: the path KL"):
        fit(loop, 25, callbacks=[Runaway(1.0, every=100), lambda f: pushed(f, 3e7) if f.updates == 12 else None])
    fit(loop := build(lr=1e-6)[0], 25, callbacks=[Runaway(1.0)], directory=directory)
    assert saved_updates(directory) == 25 and weights(loop).isfinite().all()


def test_without_a_path_kl_the_rest_of_j_is_watched():
    chain, reward = affine_chain(4, 2)
    optimizer = torch.optim.Adam(chain.denoiser.parameters(), lr=1e-6)
    loop = Queue(chain, Reward(reward) + 0.1 * DriftPenalty(), Update(optimizer), batch=16, noise=Noise(0))
    watch = Runaway(1.0)
    with pytest.raises(DivergenceError, match=r"J without its path KL rose from .* it diverges; use a smaller `lr`"):
        fit(loop, 60, callbacks=[watch, lambda f: pushed(f, 1e6) if f.updates == 21 else None])


def test_large_and_sound_is_not_run_away():
    """Three hundred nats, and a learning rate at which J gets worse: that is for the report to say."""
    loop, reward = build(lr=0.5)
    loop.chain.denoiser.shift.data.add_(12.0)
    fit(loop, 40, callbacks=[Runaway(1.0)])
    assert exact_terms(loop.chain, reward)[1] < 1000


def test_the_watch_goes_on_where_it_was():
    watch, other = Runaway(1.0), Runaway(1.0)
    fit(build()[0], 10, callbacks=[watch])
    other.load_state_dict(watch.state_dict())
    assert other == watch and watch.began is not None


def test_one_batch_is_looked_at_once_and_remembered(as_users_run):
    """While a queue drains there are no new numbers: none of its looks counts, and what was seen last stands."""
    watch, drained = Runaway(1.0), seen(2000.0, updates=20)
    drained.metrics = {"grad_norm": 1.0}
    assert watch.unsound(drained) is None
    watch(seen(2000.0))
    for _ in range(3):
        watch(drained)
    assert "the path KL is" in watch.unsound(drained)
    other = Runaway(1.0)
    other.load_state_dict(watch.state_dict())
    assert "the path KL is" in other.unsound(drained)
    drained.metrics = {"grad_norm": 1.0, "held_out_path_kl": 3.0}
    assert other.unsound(drained) is None  # it has come back, on noise of its own
    with pytest.raises(DivergenceError, match="after update 30"):
        watch(seen(2000.0, updates=30))


def seen(kl, updates=10):
    """A run over two steps of three numbers, with a path KL."""
    chain = SimpleNamespace(num_steps=2, event_shape=(3,))
    return SimpleNamespace(chain=chain, metrics={"path_kl": kl}, updates=updates)


def test_what_a_path_kl_may_be_and_for_how_long(as_users_run):
    """1000 and 10 nats for every number that is drawn; twice in a row, and a sound look in between begins anew."""
    assert Runaway(1.0).unsound(seen(1060.0)) is None
    assert "the path KL is" in Runaway(1.0).unsound(seen(1061.0))
    watch = Runaway(1.0)
    for kl in (2000.0, 0.0, 2000.0, 0.0, 2000.0):
        watch(seen(kl))
    watch(seen(2000.0, updates=11))  # no look
    with pytest.raises(DivergenceError, match="after update 20"):
        watch(seen(2000.0, updates=20))
