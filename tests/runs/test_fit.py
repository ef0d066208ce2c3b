"""The driver: metrics, callbacks, targets, checkpoints."""

import itertools
import json
import os
import signal

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.loops import Queue, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.runs import RunDirectory, load_state
from implicit_diffusion.runs.fit import AdaptKL, HeldOut, StopAtKL, fit
from tests.oracles import affine_chain, exact_terms, riccati

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
    assert {"reward", "path_kl", "objective", "grad_norm", "lr", "seconds", "staleness_max"} <= lines[-1].keys()
    average = torch.cat([p.flatten() for p in result.chain.denoiser.parameters()])
    assert not torch.equal(average, weights(loop))


def test_early_stopping():
    loop, _ = build()
    result = fit(loop, 50, callbacks=[lambda f: "enough" if f.updates == 7 else None])
    assert result.stopped == "enough" and result.updates == 7


def test_stop_at_kl():
    loop, _ = build()
    target = StopAtKL(0.05, memory=0.5)
    result = fit(loop, 500, callbacks=[target])
    assert "reached the target" in result.stopped
    assert result.updates < 500
    assert target.average >= 0.05


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
        callbacks=[lambda f: os.kill(os.getpid(), signal.SIGINT) if next(calls) == 10 else None],
        directory=directory,
    )
    assert interrupted.stopped == "interrupted" and interrupted.updates == 11
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write('{"updates": 12}\n')  # as if it had gone on after its checkpoint
    second, _ = build()
    fit(second, 30, directory=directory)
    assert torch.equal(weights(whole), weights(second))
    assert [line["updates"] for line in directory.read_metrics()] == list(range(1, 31))


@pytest.mark.parametrize(("every", "last"), [(0.0, 8), (1e9, 0)])
def test_a_non_finite_value_leaves_the_last_good_state_on_disk(tmp_path, every, last):
    loop, _ = build()
    directory = RunDirectory.create(tmp_path / "run")

    def spoil(f):
        if f.updates == 9:
            f.loop.chain.denoiser.gain.data[1] = float("inf")

    message = "hold NaN or infinity.*last good state is in .*checkpoint"
    with pytest.raises(NonFiniteError, match=message):
        fit(loop, 30, callbacks=[spoil], directory=directory, checkpoint_every=every)
    saved = load_state(directory.checkpoint)["loop"]
    assert saved["update"]["updates"] == last
    assert saved["model"]["gain"].isfinite().all()


def test_bad_updates():
    loop, _ = build()
    with pytest.raises(InvalidInputError, match="updates"):
        fit(loop, 0)
