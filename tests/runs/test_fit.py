"""The driver: metrics, callbacks, targets, checkpoints."""

import itertools
import json
import signal

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.gradients import ScoreFunction, TruncatedBackprop
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.callbacks.rise import Rise
from implicit_diffusion.runs.callbacks.targets import AdaptKL, StopAtKL
from implicit_diffusion.runs.callbacks.watch import Runaway
from implicit_diffusion.runs.fit import fit
from tests.helpers.oracles import affine_chain, exact_terms, riccati

BETA = 0.3


def build(lr=0.02, batch=16, **update):
    chain, reward = affine_chain(4, 2)
    optimizer = torch.optim.Adam(chain.denoiser.parameters(), lr=lr)
    loop = Queue(chain, Reward(reward) + BETA * PathKL(), Update(optimizer, **update), batch=batch, noise=Noise(0))
    return loop, reward


def weights(loop):
    return torch.cat([p.detach().flatten().clone() for p in loop.chain.denoiser.parameters()])


def test_metrics_reach_the_disk_and_the_callbacks(tmp_path):
    loop, reward = build(ema_decay=0.9)
    directory = RunDirectory.create(tmp_path / "run")
    seen = []
    held_out = HeldOut(reward, Noise(9).stream(2), every=5, starts=64)
    result = fit(loop, 12, callbacks=[held_out, lambda f: seen.append(f.updates)], directory=directory)
    lines = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]
    assert seen == list(range(1, 13)) == [line["updates"] for line in lines]
    assert result.updates == 12 and result.stopped is None and result.seconds > 0
    assert [i + 1 for i, line in enumerate(lines) if "held_out_reward" in line] == [5, 10]
    always, full = {"grad_norm", "lr", "seconds", "staleness_max"}, {"reward", "path_kl", "objective"}
    assert all(always <= line.keys() for line in lines) and full <= lines[4].keys()
    assert lines[-1]["phase"] == "draining" and not full & lines[-1].keys()  # no batch came home: none is repeated
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert len(set(rewards)) == len(rewards) > 6
    average = torch.cat([p.flatten() for p in result.chain.denoiser.parameters()])
    assert not torch.equal(average, weights(loop))


def test_early_stopping():
    loop, _ = build()
    result = fit(loop, 50, callbacks=[lambda f: "enough" if f.updates == 7 else None])
    assert result.stopped == "enough" and result.updates == 7


def test_stop_at_kl():
    loop, _ = build()
    target = StopAtKL(0.05, decay=0.5)
    result = fit(loop, 500, callbacks=[target])
    assert "reached the target" in result.stopped
    assert result.updates < 500
    assert target.average >= 0.05


@pytest.mark.slow
def test_adapt_kl_sits_at_the_target():
    """The exact path KL of the final gains, against a target well below that of the untouched β."""
    loop, reward = build(lr=0.02, batch=64)
    free = exact_terms_at_optimum(loop, reward)
    target = free / 4
    fit(loop, 1500, callbacks=[AdaptKL(target)])
    kl = exact_terms(loop.chain, reward)[1].item()
    assert abs(kl / target - 1) < 0.15
    assert loop.objective.weight(PathKL) > BETA


def exact_terms_at_optimum(loop, reward):
    _, gain, shift = riccati(loop.chain, reward, BETA)
    return exact_terms(loop.chain.replace(denoiser=type(loop.chain.denoiser)(gain, shift)), reward)[1].item()


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    whole, _ = build()
    fit(whole, 30)
    directory = RunDirectory.create(tmp_path / "run")
    first, _ = build()
    calls = itertools.count()
    interrupted = fit(
        first,
        30,
        callbacks=[lambda f: signal.raise_signal(signal.SIGINT) if next(calls) == 10 else None],
        directory=directory,
    )
    assert interrupted.stopped == "interrupted" and interrupted.updates == 11
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write('{"updates": 12}\n')  # as if it had gone on after its checkpoint
    second, _ = build()
    fit(second, 30, directory=directory)
    assert torch.equal(weights(whole), weights(second))
    assert [line["updates"] for line in directory.read_metrics()] == list(range(1, 31))


class Enough:
    """Stops after three updates; a signal comes while it settles."""

    def __init__(self, signals):
        self.signals = signals

    def __call__(self, state):
        return "enough" if state.updates == 3 else None

    def settle(self, state):
        if self.signals:
            signal.raise_signal(signal.SIGINT)
        return "More is too much"


def test_an_interrupt_while_a_model_is_put_back_is_heard(tmp_path):
    """Nobody has to press Ctrl-C twice; the run that goes on ends as it would have."""
    ends = [fit(build()[0], 10, callbacks=[Enough(s)], directory=tmp_path / "run").stopped for s in (True, False)]
    assert ends == ["interrupted", "enough. More is too much"]


@pytest.mark.parametrize(("every", "last"), [(0.0, 8), (1e9, 0)])
def test_a_non_finite_value_leaves_the_last_good_state_on_disk(tmp_path, every, last):
    loop, _ = build()
    directory = RunDirectory.create(tmp_path / "run")

    def spoil(f):
        if f.updates == 9:
            f.loop.chain.denoiser.gain.data[1] = float("inf")

    message = f"hold NaN or infinity.*last good state is in .*checkpoint/00000{last}"
    with pytest.raises(NonFiniteError, match=message):
        fit(loop, 30, callbacks=[spoil], directory=directory, checkpoint_every=every)
    saved = directory.read_checkpoint().state["loop"]
    assert saved["update"]["updates"] == last
    assert saved["model"]["gain"].isfinite().all()


class Count:
    """Stops at its tenth call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, f):
        self.calls += 1
        return "enough" if self.calls >= 10 else None

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_what_callbacks_remember_is_part_of_the_run(tmp_path):
    """Also where the others are not the same ones."""
    directory = RunDirectory.create(tmp_path / "run")

    def pause(f):
        return "pause" if f.updates == 6 else None

    first, second = [Count(), StopAtKL(99.0)], [StopAtKL(99.0), Count(), Count()]
    assert fit(build()[0], 30, callbacks=[*first, pause], directory=directory).updates == 6
    result = fit(build()[0], 30, callbacks=second, directory=directory)
    assert (result.updates, result.stopped) == (10, "enough")
    assert second[1].calls == 10 and second[2].calls == 3  # which began anew, and is not asked once another has stopped
    whole = StopAtKL(99.0)
    fit(build()[0], 30, callbacks=[whole, Count()])
    assert second[0].average == pytest.approx(whole.average, rel=1e-12)


def test_a_second_call_goes_on_where_the_first_ended(tmp_path):
    whole, loop, other = build()[0], build()[0], build()[0]
    directory, seen = RunDirectory.create(tmp_path / "run"), []
    fit(loop, 8, directory=directory)
    assert directory.read_checkpoint().state["loop"]["update"]["updates"] == 8
    trained = weights(loop)
    again = fit(loop, 8, directory=directory)  # nothing is left to do, and nothing is undone
    assert torch.equal(weights(loop), trained) and again.metrics["updates"] == 8
    fit(other, 12, directory=directory, callbacks=[lambda f: seen.append(f.updates)])
    fit(whole, 8), fit(whole, 12)
    assert seen == [9, 10, 11, 12] and torch.equal(weights(other), weights(whole))
    assert [line["updates"] for line in directory.read_metrics()] == list(range(1, 13))


def test_a_loop_that_is_further_than_the_checkpoint_is_kept(tmp_path):
    loop, directory, seen = build()[0], RunDirectory.create(tmp_path / "run"), []
    fit(loop, 3, directory=directory)
    for _ in loop.run(7):
        pass
    fit(loop, 9, directory=directory, callbacks=[lambda f: seen.append(f.updates)])
    assert seen == [8, 9]


@pytest.mark.parametrize("callback", [StopAtKL(1.0), AdaptKL(1.0)])
@pytest.mark.parametrize("beta", [None, 0.0])
def test_aiming_at_a_path_kl_that_is_not_there(callback, beta):
    loop, reward = build()
    loop.objective = Reward(reward) if beta is None else Reward(reward) + beta * PathKL()
    with pytest.raises(InvalidInputError, match=r"KL needs a path KL to aim at.*add beta \* PathKL"):
        fit(loop, 3, callbacks=[callback])


@pytest.mark.parametrize("callback", [StopAtKL(1.0), AdaptKL(1.0), Runaway(reward_std=1.0)])
@pytest.mark.parametrize("estimator", [TruncatedBackprop(2), TruncatedBackprop(6, random=True)])
@pytest.mark.parametrize("kind", [Nested, Queue])
def test_a_path_kl_that_the_estimator_leaves_unknown_is_refused_before_the_first_step(callback, estimator, kind):
    """With rows left out no step reports the path KL: a callback that aims at it would never act."""
    chain, reward = affine_chain(6, 2)
    adam = torch.optim.Adam(chain.denoiser.parameters(), lr=0.01)
    loop = kind(chain, Reward(reward) + 0.5 * PathKL(), adam, batch=4, noise=Noise(0), estimator=estimator)
    with pytest.raises(InvalidInputError, match=r"needs .* TruncatedBackprop\(.* does not pull back all 6 rows"):
        fit(loop, 40, callbacks=[callback])
    assert loop.iteration == 0
    held_out = HeldOut(reward, Noise(1), starts=64)
    assert fit(loop, 4, callbacks=[StopAtKL(1e9, held_out=held_out), Rise(held_out)]).updates == 4


@pytest.mark.parametrize("estimator", [TruncatedBackprop(6), ScoreFunction()])
def test_a_path_kl_that_the_estimator_knows_is_aimed_at(estimator):
    chain, reward = affine_chain(6, 2)
    adam = torch.optim.Adam(chain.denoiser.parameters(), lr=0.01)
    loop = Queue(chain, Reward(reward) + 0.5 * PathKL(), adam, batch=4, noise=Noise(0), estimator=estimator)
    fit(loop, 20, callbacks=[AdaptKL(1.0), Runaway(reward_std=10.0)])
    assert loop.objective.weight(PathKL) != 0.5


def test_one_held_out_start_has_no_error(tmp_path):
    loop, reward = build()
    held_out = HeldOut(reward, Noise(9), every=1, starts=1)
    metrics = fit(loop, 1, callbacks=[held_out], directory=RunDirectory.create(tmp_path / "run")).metrics
    assert "held_out_reward" in metrics and "held_out_reward_se" not in metrics


def test_bad_updates():
    loop, _ = build()
    with pytest.raises(InvalidInputError, match="updates"):
        fit(loop, 0)
